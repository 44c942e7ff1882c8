//! A clock that is cheap enough to be read for every request.
//!
//! `clock_gettime(2)` takes some 20 ns, the processor's own counter 5 to 8. It is used where the kernel itself goes by it: then
//! it runs at one rate on all processors, whatever they sleep or do.

use std::fs;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// How long the counter is compared with the kernel's clock, once for each process: off by 10 ppm at the most.
const COMPARED: Duration = Duration::from_millis(5);

/// The process's one, found by whoever asks first.
static CLOCK: LazyLock<Clock> = LazyLock::new(Clock::compare);

/// Nanoseconds since the process first asked for a clock.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
    counter: Option<Counter>,
}

#[derive(Clone, Copy, Debug)]
struct Counter {
    start: u64,
    /// Nanoseconds in 2^32 of its steps.
    rate: u64,
}

impl Clock {
    /// The process's clock. The first call takes 5 ms and reads a file of `/sys`, later ones nothing.
    pub fn get() -> Clock {
        *CLOCK
    }

    fn compare() -> Clock {
        let start = Instant::now();
        let counter = is_trusted().then(|| {
            let (begun, first) = (Instant::now(), counter());
            std::thread::sleep(COMPARED);
            let (steps, nanoseconds) = (counter().saturating_sub(first), begun.elapsed().as_nanos());
            let rate = (nanoseconds << 32).checked_div(steps.into())?;
            Some(Counter { start: first, rate: u64::try_from(rate).ok()? })
        });
        Clock { start, counter: counter.flatten() }
    }

    /// Nanoseconds, for 584 years. It never stands still for long, and may go back by some nanoseconds where it is read by
    /// several threads.
    #[inline]
    pub fn now(&self) -> u64 {
        match self.counter {
            Some(Counter { start, rate }) => {
                let steps = counter().saturating_sub(start);
                ((u128::from(steps) * u128::from(rate)) >> 32) as u64
            }
            None => self.start.elapsed().as_nanos() as u64,
        }
    }
}

/// Whether the kernel's own clock is made from the counter, by itself or as a hypervisor's page says.
fn is_trusted() -> bool {
    let source = fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    let known = ["tsc", "kvm-clock", "hyperv_clocksource_tsc_page"];
    cfg!(target_arch = "x86_64") && source.is_ok_and(|source| known.contains(&source.trim()))
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn counter() -> u64 {
    // SAFETY: every processor of this architecture has it; a kernel that forbids it (PR_SET_TSC) does not go by it for us.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> u64 {
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_tell_the_kernels_time() {
        let plain = Clock { counter: None, ..Clock::get() };
        for clock in [Clock::get(), plain] {
            let (first, begun) = (clock.now(), Instant::now());
            std::thread::sleep(Duration::from_millis(50));
            let (told, real) = (clock.now() - first, begun.elapsed().as_nanos() as u64);
            // The second is read after the first: never less by more than the rate's error.
            assert!(
                told + real / 100 >= 50_000_000 && told <= real + real / 100 + 1_000_000,
                "{told} {real}"
            );
        }
    }
}
