//! Which worker serves which queue: decided before it runs.
//!
//! An export has workers of its own (`workers=`), which serve no other one, or it shares the others. What is fixed is
//! also who may be held up by whom: a worker that will never serve a second volume may wait for its store.

#![forbid(unsafe_code)]

use crate::service::config::Config;
use std::collections::BTreeSet;

/// See the module. Workers are numbered from 0: first those that are shared, then each export's own.
#[derive(Debug, PartialEq, Eq)]
pub struct Placement {
    /// For each vhost-user export, in the order of the configuration: its queues, and the workers that these go to in
    /// turn, from its first queue on.
    pub vhost_user: Vec<(u16, Vec<usize>)>,
    /// For each ublk export the worker of each queue.
    pub ublk: Vec<Vec<usize>>,
    /// The first so many workers are shared.
    shared: usize,
    /// For each worker the volumes whose queues it may be given.
    volumes: Vec<BTreeSet<String>>,
}

/// What is to be placed.
struct Export<'a> {
    volume: &'a str,
    queues: Option<u16>,
    own: Option<u16>,
}

/// Where an export's queues may go, and where the next one does.
struct Workers {
    first: usize,
    count: usize,
    next: usize,
}

impl Workers {
    /// The workers of so many queues; the next export begins `advance` workers on.
    fn take(&mut self, queues: usize, advance: usize) -> Vec<usize> {
        let on = (0..queues).map(|queue| self.first + (self.next + queue) % self.count).collect();
        self.next = (self.next + advance) % self.count;
        on
    }
}

impl Placement {
    /// Places what `config` says on workers of which at most `cpus` are shared, unless it says how many. All queues of
    /// a volume that is `single_worker` (its flushes cover one worker's writes alone) go to one worker: where one of
    /// its exports has workers of its own, to the first of those.
    pub fn of(config: &Config, single_worker: impl Fn(&str) -> bool, cpus: usize) -> Placement {
        let vhost_user = config.vhost_user.iter();
        let vhost_user =
            vhost_user.map(|of| Export { volume: &of.volume, queues: of.queues, own: of.workers });
        let ublk = config.ublk.iter();
        let ublk = ublk.map(|of| Export { volume: &of.volume, queues: of.queues, own: of.workers });
        let exports: Vec<Export> = vhost_user.chain(ublk).collect();

        // The export whose own workers each export uses.
        let owner = |at: usize| {
            let volume = exports[at].volume;
            let same = |other: &Export| other.volume == volume && other.own.is_some();
            match single_worker(volume) {
                true => exports.iter().position(same),
                false => exports[at].own.map(|_| at),
            }
        };
        let owners: Vec<Option<usize>> = (0..exports.len()).map(owner).collect();
        let queues = exports.iter().zip(&owners).filter(|(_, owner)| owner.is_none());
        let queues: usize = queues.map(|(export, _)| export.queues.map_or(cpus, usize::from)).sum();
        let count = match (queues, config.may_grow()) {
            (0, false) => 0,
            (_, false) => config.workers.unwrap_or(cpus.min(queues)).max(1),
            (_, true) => config.workers.unwrap_or(cpus).max(1),
        };

        let mut shared = Workers { first: 0, count, next: 0 };
        let mut total = count;
        let mut own: Vec<Option<Workers>> = exports.iter().map(|_| None).collect();
        for at in owners.iter().flatten() {
            if own[*at].is_none() {
                let Export { volume, queues, own: asked } = exports[*at];
                let most = if single_worker(volume) { 1 } else { queues.unwrap_or(u16::MAX) };
                let count = usize::from(asked.unwrap_or(1).min(most));
                own[*at] = Some(Workers { first: total, count, next: 0 });
                total += count;
            }
        }

        let volumes = vec![BTreeSet::new(); total];
        let mut placement = Placement { vhost_user: Vec::new(), ublk: Vec::new(), shared: count, volumes };
        for (at, export) in exports.iter().enumerate() {
            let workers = owners[at].and_then(|owner| own[owner].as_mut()).unwrap_or(&mut shared);
            let mut only;
            let workers = match single_worker(export.volume) {
                true => {
                    // Which one follows from its place in the list.
                    let of = config.volumes.keys().position(|name| name == export.volume).unwrap_or(0);
                    only = Workers { first: workers.first + of % workers.count, count: 1, next: 0 };
                    &mut only
                }
                false => workers,
            };
            let on = if let Some(config) = config.vhost_user.get(at) {
                // Most VMMs use few of the queues that they may use: where there is no number, the first counts.
                let queues = config.most_queues();
                let on = workers.take(workers.count.min(queues.into()), export.queues.unwrap_or(1).into());
                placement.vhost_user.push((queues, on.clone()));
                on
            } else {
                let queues = export.queues.map_or(workers.count, usize::from);
                placement.ublk.push(workers.take(queues, queues));
                placement.ublk[at - config.vhost_user.len()].clone()
            };
            on.iter().for_each(|worker| {
                placement.volumes[*worker].insert(export.volume.to_owned());
            });
        }
        placement
    }

    /// Places an export that comes while others are served: at most `queues` queues, each on a worker of its own as far as there
    /// are any, beginning with the one that has the fewest volumes. Where the volume is `single_worker`, all go to the one that
    /// has it, or to that. Empty where no worker is shared.
    pub fn add(&mut self, volume: &str, queues: Option<u16>, single_worker: bool) -> Vec<usize> {
        let least = (0..self.shared).min_by_key(|worker| self.volumes[*worker].len());
        let has = self.serving(volume).next();
        let (first, count) = match (single_worker, has, least) {
            (_, _, None) => return Vec::new(),
            (true, Some(has), _) => (has, 1),
            (true, None, Some(least)) => (least, 1),
            (false, _, Some(least)) => (least, self.shared.min(queues.map_or(usize::MAX, usize::from))),
        };
        let on: Vec<usize> = match count {
            1 => vec![first],
            _ => (0..count).map(|queue| (first + queue) % self.shared).collect(),
        };
        on.iter().for_each(|worker| {
            self.volumes[*worker].insert(volume.to_owned());
        });
        on
    }

    /// No export of this volume is served any more.
    pub fn remove(&mut self, volume: &str) {
        self.volumes.iter_mut().for_each(|of| {
            of.remove(volume);
        });
    }

    /// Workers there are to be.
    pub fn workers(&self) -> usize {
        self.volumes.len()
    }

    /// Whether a worker may be given queues of several volumes.
    pub fn is_shared(&self, worker: usize) -> bool {
        self.volumes[worker].len() > 1
    }

    /// The workers that may be given queues of a volume.
    pub fn serving(&self, volume: &str) -> impl Iterator<Item = usize> {
        self.volumes.iter().enumerate().filter(move |(_, of)| of.contains(volume)).map(|(worker, _)| worker)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::config::Loader;

    fn config(workers: Option<usize>, volumes: &[&str], vhost_user: &[&str], ublk: &[&str]) -> Config {
        let mut loader = Loader::new();
        volumes.iter().for_each(|name| loader.add_volume_flag(&format!("{name}=null:1G")).unwrap());
        for (number, text) in vhost_user.iter().enumerate() {
            let (volume, options) = text
                .split_once(',')
                .map_or((*text, String::new()), |(volume, options)| (volume, format!(",{options}")));
            loader.add_vhost_user_flag(&format!("{volume}=/run/{number}{options}")).unwrap();
        }
        ublk.iter().for_each(|text| loader.add_ublk_flag(text).unwrap());
        workers.into_iter().for_each(|count| loader.set_workers(count));
        loader.finish().unwrap()
    }

    fn place(workers: Option<usize>, vhost_user: &[&str], ublk: &[&str], cpus: usize) -> Placement {
        let config = config(workers, &["a", "b", "c", "one"], vhost_user, ublk);
        Placement::of(&config, |name| name == "one", cpus)
    }

    fn on(placement: &Placement) -> (Vec<Vec<usize>>, Vec<Vec<usize>>) {
        (placement.vhost_user.iter().map(|(_, on)| on.clone()).collect(), placement.ublk.clone())
    }

    #[test]
    fn queues_go_on_where_the_last_ones_ended() {
        let placement = place(Some(3), &["a,queues=2", "b,queues=2"], &["c,queues=4"], 8);
        assert_eq!(on(&placement), (vec![vec![0, 1], vec![2, 0]], vec![vec![1, 2, 0, 1]]));
        assert_eq!(placement.workers(), 3);
        assert!((0..3).all(|worker| placement.is_shared(worker)));
    }

    /// Every VMM may use them all, and most use the first alone: those are spread.
    #[test]
    fn first_queues_are_spread_where_there_is_no_number() {
        let placement = place(Some(2), &["a", "b", "c"], &[], 8);
        assert_eq!(on(&placement).0, [[0, 1], [1, 0], [0, 1]]);
        assert!(placement.vhost_user.iter().all(|(queues, _)| *queues >= 64));
    }

    #[test]
    fn as_many_workers_as_cpus_and_no_more_than_queues() {
        let count = |vhost_user: &[&str], ublk: &[&str], cpus| place(None, vhost_user, ublk, cpus).workers();
        assert_eq!(count(&["a"], &[], 4), 4);
        assert_eq!(count(&["a", "b", "c"], &["a"], 4), 4);
        assert_eq!(count(&["a,queues=1"], &[], 4), 1);
        assert_eq!(count(&["a,queues=1"], &["b,queues=2"], 4), 3);
        assert_eq!(count(&[], &["b"], 6), 6);
        assert_eq!(place(Some(9), &["a,queues=1"], &[], 4).workers(), 9);
    }

    #[test]
    fn a_worker_of_one_volume_is_not_shared() {
        let placement = place(Some(1), &["a", "a,queues=2"], &["a"], 4);
        assert!(!placement.is_shared(0), "three exports of one volume");
        let placement = place(Some(2), &["a,queues=1", "b,queues=1"], &[], 4);
        assert!(!placement.is_shared(0) && !placement.is_shared(1));
        assert_eq!(placement.serving("b").collect::<Vec<_>>(), [1]);
        assert_eq!(placement.serving("c").count(), 0);
    }

    #[test]
    fn what_comes_later_goes_where_the_least_is() {
        let mut placement = place(Some(2), &["a,queues=1", "a,workers=1"], &[], 4);
        assert_eq!(placement.add("b", Some(1), false), [1]);
        assert_eq!(placement.add("c", None, false), [0, 1], "never on a worker of another's own");
        assert!(placement.is_shared(0) && placement.is_shared(1));
        let one = placement.add("one", None, true);
        assert_eq!(placement.add("one", Some(4), true), one, "all of it on one");
        placement.remove("c");
        placement.remove("one");
        assert!(!placement.is_shared(1) && placement.serving("c").next().is_none());
        let mut placement = place(None, &["a,workers=1"], &[], 4);
        assert_eq!(placement.add("b", None, false), [0usize; 0], "none is shared");
    }

    #[test]
    fn workers_of_its_own_serve_nothing_else() {
        let placement = place(Some(2), &["a,workers=2", "b", "c"], &["b,workers=1", "a,queues=3"], 8);
        let (vhost_user, ublk) = on(&placement);
        assert_eq!(vhost_user, [[2, 3], [0, 1], [1, 0]]);
        assert_eq!(ublk, [vec![4], vec![0, 1, 0]]);
        assert_eq!(placement.workers(), 5);
        let shared: Vec<bool> = (0..5).map(|worker| placement.is_shared(worker)).collect();
        assert_eq!(shared, [true, true, false, false, false]);
    }

    #[test]
    fn there_are_no_workers_that_nobody_shares_or_needs() {
        let placement = place(Some(4), &["a,workers=1"], &["b,workers=3,queues=2"], 8);
        assert_eq!(on(&placement), (vec![vec![0]], vec![vec![1, 2]]));
        assert_eq!(placement.workers(), 3);
    }

    /// However many exports it has, and whichever of them has workers of its own.
    #[test]
    fn a_volume_for_one_worker_stays_on_one() {
        let exports: [(&[&str], &[&str]); 4] = [
            (&["one", "a", "one,queues=8"], &["one,queues=2"]),
            (&["one", "a", "one,workers=4"], &["one"]),
            (&["one,workers=1", "a", "one,workers=2"], &["one,workers=3"]),
            (&["a"], &["one,workers=2,queues=4"]),
        ];
        for (vhost_user, ublk) in exports {
            let placement = place(Some(3), vhost_user, ublk, 8);
            let only: Vec<usize> = placement.serving("one").collect();
            assert_eq!(only.len(), 1, "{vhost_user:?} {ublk:?}");
            if vhost_user.iter().chain(ublk).any(|text| text.contains("workers")) {
                assert!(!placement.is_shared(only[0]), "{vhost_user:?} {ublk:?}");
                assert_eq!(placement.workers(), 4);
            }
        }
    }
}
