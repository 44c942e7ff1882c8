//! Where a worker's thread runs.
//!
//! The kernel gives each ublk queue the requests of certain CPUs, and a request costs least where it came
//! from. So a worker that serves ublk queues alone stays on their CPUs; vrings have none, and a worker with
//! one of them runs wherever it may.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The calling thread's CPUs.
pub(super) struct Affinity {
    /// Where it was allowed to run from the start (by cpuset or taskset); we never leave that.
    allowed: Option<CpuSet>,
    current: Option<CpuSet>,
}

impl Affinity {
    pub fn of_this_thread() -> Affinity {
        let allowed =
            sched_getaffinity(None).inspect_err(|error| log::debug!("sched_getaffinity: {error}")).ok();
        Affinity { allowed, current: allowed }
    }

    /// Moves the thread to suit its queues: each brings its CPUs, or `None` where any will do.
    pub fn suit<'a>(&mut self, queues: impl Iterator<Item = Option<&'a [usize]>>) {
        let Some(allowed) = self.allowed else { return };
        let wanted = choose(&allowed, queues);
        if self.current == Some(wanted) {
            return;
        }
        // A thread that stays where it is serves as well, only slower.
        match sched_setaffinity(None, &wanted) {
            Ok(()) => self.current = Some(wanted),
            Err(error) => log::debug!("sched_setaffinity: {error}"),
        }
    }
}

/// The union of the queues' CPUs as far as it is allowed; all that is allowed when that is nothing, or when a
/// queue does not care.
fn choose<'a>(allowed: &CpuSet, queues: impl Iterator<Item = Option<&'a [usize]>>) -> CpuSet {
    let mut union = CpuSet::new();
    for cpus in queues {
        let Some(cpus) = cpus.filter(|cpus| !cpus.is_empty()) else { return *allowed };
        for cpu in cpus.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU && allowed.is_set(**cpu)) {
            union.set(*cpu);
        }
    }
    if union.count() == 0 { *allowed } else { union }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(cpus: &[usize]) -> CpuSet {
        let mut set = CpuSet::new();
        cpus.iter().for_each(|cpu| set.set(*cpu));
        set
    }

    #[test]
    fn the_union_within_what_is_allowed() {
        let allowed = set(&[0, 1, 2, 3]);
        let chosen = |queues: &[Option<&[usize]>]| choose(&allowed, queues.iter().copied());
        assert!(chosen(&[]) == allowed);
        assert!(chosen(&[Some(&[1])]) == set(&[1]));
        assert!(chosen(&[Some(&[1]), Some(&[3, 7])]) == set(&[1, 3]));
        assert!(chosen(&[Some(&[7])]) == allowed, "none of its CPUs is ours");
        assert!(chosen(&[Some(&[1]), None]) == allowed, "a vring may run anywhere");
        assert!(chosen(&[Some(&[1]), Some(&[])]) == allowed);
        assert!(chosen(&[Some(&[usize::MAX, 2])]) == set(&[2]));
    }
}
