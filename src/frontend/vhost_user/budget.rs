//! How much guest memory may be mapped: what a process has for all its VMMs, shared so that no VMM can use up what
//! another was promised.
//!
//! A region costs a mapping, a descriptor and addresses. Mappings and descriptors are divided by the exports, and each
//! VMM is offered its part as memory slots (GET_MAX_MEM_SLOTS). Addresses nobody offers: a quarter is divided by the
//! exports, and whoever needs more takes it from the rest, first come, first served.

#![forbid(unsafe_code)]

use rustix::process::{Resource, getrlimit};
use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the kernel's own vhost has, and vhost-user-backend offers.
pub const MOST_SLOTS: usize = 509;

/// What one message can bring, SET_MEM_TABLE; offered however little there is.
pub const LEAST_SLOTS: usize = vhost::vhost_user::message::MAX_ATTACHED_FD_ENTRIES;

/// Of one VMM's table, bytes: 16 TiB.
pub const MOST_BYTES: u64 = 16 << 40;

/// Addresses for guest memory, bytes. A process has 128 TiB on x86-64, the most of all that it maps.
const ADDRESSES: u64 = 96 << 40;

/// `vm.max_map_count` where it cannot be read: the kernel's default.
const MAPPINGS: usize = 65530;

/// The process's part for guest memory, divided.
#[derive(Debug)]
pub struct MemoryBudget {
    slots: usize,
    /// Bytes that each export has for itself.
    own: u64,
    /// Bytes that are left for whoever needs more.
    common: Mutex<u64>,
}

/// One export's part. Its VMMs come one after the other.
#[derive(Debug)]
pub struct MemoryShare {
    budget: Arc<MemoryBudget>,
    /// Bytes mapped.
    used: Mutex<u64>,
}

/// Addresses that are set aside until it is dropped.
#[derive(Debug)]
pub struct Charge {
    share: Arc<MemoryShare>,
    bytes: u64,
}

fn lock(counter: &Mutex<u64>) -> MutexGuard<'_, u64> {
    counter.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MemoryBudget {
    /// For so many exports, by the limits of this process as they are now: half of its mappings and half of its
    /// descriptors are for guest memory.
    pub fn of_process(exports: usize) -> Arc<MemoryBudget> {
        let mappings = fs::read_to_string("/proc/sys/vm/max_map_count");
        let mappings = mappings.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(MAPPINGS);
        let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let files = usize::try_from(files).unwrap_or(usize::MAX);
        Arc::new(MemoryBudget::new(exports, mappings.min(files) / 2, ADDRESSES))
    }

    /// For so many exports: regions and bytes of addresses for all together.
    fn new(exports: usize, regions: usize, addresses: u64) -> MemoryBudget {
        let exports = exports.max(1);
        // While a table takes the place of another, both are mapped. One that is added to shares what stays.
        let slots = (regions / exports).saturating_sub(LEAST_SLOTS).clamp(LEAST_SLOTS, MOST_SLOTS);
        let own = addresses / 4 / exports as u64;
        MemoryBudget { slots, own, common: Mutex::new(addresses - own * exports as u64) }
    }

    /// The next export's part.
    pub fn share(self: &Arc<Self>) -> Arc<MemoryShare> {
        Arc::new(MemoryShare { budget: self.clone(), used: Mutex::new(0) })
    }
}

impl MemoryShare {
    /// Memory slots that its VMM can count on: 32 to 509.
    pub fn slots(&self) -> usize {
        self.budget.slots
    }

    /// Bytes that are set aside.
    #[cfg(test)]
    pub(super) fn used(&self) -> u64 {
        *lock(&self.used)
    }

    /// Sets `bytes` of addresses aside.
    ///
    /// # Errors
    /// What there is, when that is less.
    pub fn charge(self: &Arc<Self>, bytes: u64) -> Result<Charge, String> {
        let mut used = lock(&self.used);
        let next = used.saturating_add(bytes);
        let more = next.saturating_sub(self.budget.own) - used.saturating_sub(self.budget.own);
        let mut common = lock(&self.budget.common);
        let Some(left) = common.checked_sub(more) else {
            let free = self.budget.own.saturating_sub(*used) + *common;
            return Err(format!("{bytes} bytes of memory, and there are addresses for {free} more"));
        };
        (*common, *used) = (left, next);
        Ok(Charge { share: self.clone(), bytes })
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let mut used = lock(&self.share.used);
        let (own, next) = (self.share.budget.own, *used - self.bytes);
        *lock(&self.share.budget.common) += used.saturating_sub(own) - next.saturating_sub(own);
        *used = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn slots_are_divided_by_the_exports() {
        let slots = |exports, regions| MemoryBudget::new(exports, regions, ADDRESSES).slots;
        assert_eq!(slots(1, MAPPINGS / 2), MOST_SLOTS);
        assert_eq!(slots(0, MAPPINGS / 2), MOST_SLOTS);
        assert_eq!(slots(100, MAPPINGS / 2), 327 - 32);
        assert_eq!(slots(1000, MAPPINGS / 2), LEAST_SLOTS);
        assert_eq!(slots(1, 512), 480);
        assert_eq!(slots(1, 0), LEAST_SLOTS);
        for exports in 1..500 {
            let needed = exports * (slots(exports, MAPPINGS / 2) + LEAST_SLOTS);
            assert!(needed <= MAPPINGS / 2, "{exports}");
        }
    }

    #[test]
    fn what_one_is_promised_no_other_can_take() {
        let budget = Arc::new(MemoryBudget::new(4, 1000, 1600));
        let (greedy, modest) = (budget.share(), budget.share());
        // Its own 100, and all 1200 that are common.
        let all = greedy.charge(1300).unwrap();
        assert!(greedy.charge(1).unwrap_err().contains("addresses for 0 more"));
        let own = modest.charge(100).unwrap();
        modest.charge(1).unwrap_err();
        drop(own);
        let own = modest.charge(60).unwrap();
        modest.charge(41).unwrap_err();
        drop(all);
        drop((modest.charge(1240).unwrap(), own));
        assert_eq!((*lock(&budget.common), *lock(&modest.used)), (1200, 0));
    }

    #[test]
    fn sizes_near_the_end_of_the_world() {
        let share = MemoryBudget::of_process(3).share();
        let _one = share.charge(1 << 20).unwrap();
        share.charge(u64::MAX).unwrap_err();
        share.charge(u64::MAX - (1 << 20)).unwrap_err();
    }

    proptest! {
        #[test]
        fn nothing_is_lost(steps in proptest::collection::vec((0..4usize, 0..400u64, any::<bool>()), 0..200)) {
            let budget = Arc::new(MemoryBudget::new(4, 1000, 1600));
            let shares: Vec<_> = (0..4).map(|_| budget.share()).collect();
            let mut held: Vec<Vec<Charge>> = (0..4).map(|_| Vec::new()).collect();
            for (of, bytes, back) in steps {
                if back {
                    held[of].pop();
                } else {
                    let used: u64 = held[of].iter().map(|charge| charge.bytes).sum();
                    match shares[of].charge(bytes) {
                        Ok(charge) => held[of].push(charge),
                        Err(_) => prop_assert!(used + bytes > 100, "its own was not given"),
                    }
                }
                let all: u64 = held.iter().flatten().map(|charge| charge.bytes).sum();
                prop_assert!(all <= 1600);
            }
            held.clear();
            prop_assert_eq!(*lock(&budget.common), 1200);
        }
    }
}
