//! Atomics in memory that others share with us: the rings, which the driver reads and writes, and the in-flight log of what is in
//! flight, which outlive us.
//!
//! They are the standard library's. Tests have others in their place, which tell an observer of each access and of each
//! fence: most processors keep an order that was not asked for, so that a run cannot show whether it was.

#![forbid(unsafe_code)]

#[cfg(not(test))]
pub(super) use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
#[cfg(test)]
pub(super) use traced::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

#[cfg(test)]
pub(super) mod traced {
    use std::cell::RefCell;
    use std::sync::atomic;
    pub use std::sync::atomic::Ordering;

    /// What was done, at which address and in which order.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Access {
        Load(usize, Ordering),
        /// Seen after it was done.
        Store(usize, Ordering),
        Fence(Ordering),
    }

    type Observer = Box<dyn FnMut(Access)>;

    thread_local! {
        static OBSERVER: RefCell<Option<Observer>> = const { RefCell::new(None) };
    }

    /// Runs `steps` under an observer of what the calling thread does meanwhile. The observer's own accesses are not
    /// seen.
    pub fn observed<T>(observer: impl FnMut(Access) + 'static, steps: impl FnOnce() -> T) -> T {
        OBSERVER.set(Some(Box::new(observer)));
        let result = steps();
        OBSERVER.set(None);
        result
    }

    fn tell(access: Access) {
        // Taken out, so that the observer may do anything.
        if let Some(mut observer) = OBSERVER.take() {
            observer(access);
            OBSERVER.set(Some(observer));
        }
    }

    pub fn fence(order: Ordering) {
        atomic::fence(order);
        tell(Access::Fence(order));
    }

    macro_rules! traced {
        ($($name:ident: $int:ty),*) => {$(
            #[derive(Debug)]
            #[repr(transparent)]
            pub struct $name(atomic::$name);

            impl $name {
                #[allow(dead_code, reason = "not every kind is read")]
                pub fn load(&self, order: Ordering) -> $int {
                    tell(Access::Load(&raw const *self as usize, order));
                    self.0.load(order)
                }

                pub fn store(&self, value: $int, order: Ordering) {
                    self.0.store(value, order);
                    tell(Access::Store(&raw const *self as usize, order));
                }
            }
        )*};
    }

    traced!(AtomicU8: u8, AtomicU16: u16, AtomicU32: u32, AtomicU64: u64);
}
