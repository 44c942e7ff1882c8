//! Chains that cannot be carried out: the driver reads an error in the status byte, or hears that its vring is given up.
//! It leaves 0 in that byte beforehand, as Linux does, so a completion without a status would tell it that all went well.

#![forbid(unsafe_code)]

use super::driver::{Driver, NEXT, WRITE, Worker, device};
use super::*;

const INDIRECT: u16 = 4;

/// No memory of the guest's is there.
const NOWHERE: u64 = 1 << 40;

/// A descriptor: address, length, flags, next.
type Raw = (u64, usize, u16, u16);

/// What the driver hears of a chain that begins at descriptor 0.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    /// A completion of so many bytes.
    Status(u8, u32),
    /// Nothing more is taken.
    GivenUp,
}

const SIZE: u16 = 16;

/// Where the parts of a request are: its header, its data, its status, a table.
struct Parts {
    header: u64,
    data: u64,
    status: u64,
    table: u64,
}

fn hears(kind: u32, features: u64, chain: impl Fn(&Parts) -> (Vec<Raw>, Vec<Raw>)) -> Heard {
    let mut driver = Driver::new(SIZE, false, 0);
    let mut worker = Worker::new(driver.setup(device(), features), 1, Faults::default());
    let area = driver.area(0);
    let parts = Parts { header: area, data: area + 0x1000, status: area + 16, table: area + 0x100 };
    driver.put(area, &[&kind.to_le_bytes()[..], &[0; 13]].concat());
    let (direct, indirect) = chain(&parts);
    for (table, list) in [(driver::DESC, &direct), (parts.table, &indirect)] {
        for (index, (addr, len, flags, next)) in list.iter().enumerate() {
            driver.put_descriptor(table + 16 * index as u64, (*addr, *len, *flags), *next);
        }
    }
    // One that is as it should be, to see whether it is served.
    let before = driver.used_idx();
    driver.expect(0);
    driver.offer(0);
    worker.settle();
    let told = driver.used_idx() != before;
    let given_up = driver.err.take();
    assert_ne!(told, given_up, "one of the two");
    assert_eq!((worker.vring.in_flight(), worker.vring.is_broken()), (0, given_up));
    if given_up {
        assert_eq!(driver.get(parts.status, 1), [0]);
        return Heard::GivenUp;
    }
    let (_, written) = driver.harvest()[0];
    assert_eq!(worker.seen(), [], "nothing is carried out");
    Heard::Status(driver.get(parts.status, 1)[0], written)
}

const FAILED: Heard = Heard::Status(IOERR, 1);

#[test]
fn what_cannot_be_reached_is_an_error() {
    let plain = |header: u64, (data, len): (u64, usize)| {
        move |parts: &Parts| {
            let header = if header == 0 { parts.header } else { header };
            let data = if data == 0 { parts.data } else { data };
            let list = vec![(header, 16, NEXT, 1), (data, len, NEXT | WRITE, 2), (parts.status, 1, WRITE, 0)];
            (list, vec![])
        }
    };
    assert_eq!(hears(IN, FEATURES, plain(0, (NOWHERE, 512))), FAILED);
    assert_eq!(hears(IN, FEATURES, plain(0, (u64::MAX, 512))), FAILED);
    assert_eq!(hears(IN, FEATURES, plain(0, (0, 1 << 30))), FAILED, "data that ends outside");
    assert_eq!(hears(IN, FEATURES, plain(NOWHERE, (0, 512))), FAILED, "a header outside");
    assert_eq!(hears(GET_ID, FEATURES, plain(0, (NOWHERE, 20))), FAILED);
    assert_eq!(
        hears(OUT, FEATURES, |parts| {
            (vec![(parts.header, 16, NEXT, 1), (NOWHERE, 512, NEXT, 2), (parts.status, 1, WRITE, 0)], vec![])
        }),
        FAILED
    );
    for kind in [DISCARD, WRITE_ZEROES, FLUSH] {
        assert_eq!(
            hears(kind, FEATURES, |parts| {
                (
                    vec![(parts.header, 16, NEXT, 1), (NOWHERE, 16, NEXT, 2), (parts.status, 1, WRITE, 0)],
                    vec![],
                )
            }),
            FAILED,
            "type {kind}"
        );
    }
}

#[test]
fn what_is_laid_out_wrongly_is_an_error() {
    // Readable after writable.
    assert_eq!(
        hears(OUT, FEATURES, |parts| {
            (
                vec![
                    (parts.header, 16, NEXT, 1),
                    (parts.status, 1, NEXT | WRITE, 2),
                    (parts.data, 512, 0, 0),
                ],
                vec![],
            )
        }),
        FAILED
    );
    // A header that is too short, or of nothing.
    for len in [0, 15] {
        assert_eq!(
            hears(FLUSH, FEATURES, |parts| {
                (vec![(parts.header, len, NEXT, 1), (parts.status, 1, WRITE, 0)], vec![])
            }),
            FAILED,
            "{len}"
        );
    }
    // More than a chain may have, in a table as long as its vring is not.
    assert_eq!(
        hears(IN, FEATURES, |parts| {
            let mut list = vec![(parts.header, 16, NEXT, 1)];
            list.extend((2..15).map(|next| (parts.data, 1, NEXT | WRITE, next)));
            list.push((parts.status, 1, WRITE, 0));
            (list, vec![])
        }),
        FAILED,
        "no whole sector"
    );
    // A table of no whole number of descriptors, or one that was not agreed upon: it is clear what is meant.
    let inner = |parts: &Parts| {
        vec![(parts.header, 16, NEXT, 1), (parts.data, 512, NEXT | WRITE, 2), (parts.status, 1, WRITE, 0)]
    };
    assert_eq!(hears(IN, FEATURES, |parts| (vec![(parts.table, 49, INDIRECT, 0)], inner(parts))), FAILED);
    assert_eq!(hears(IN, 0, |parts| (vec![(parts.table, 48, INDIRECT, 0)], inner(parts))), FAILED);
}

/// A chain, and the table that it may name.
type Chain = (Vec<Raw>, Vec<Raw>);

#[test]
fn a_vring_whose_status_cannot_be_reached_is_given_up() {
    let given_up = |what: &str, chain: &dyn Fn(&Parts) -> Chain| {
        assert_eq!(hears(IN, FEATURES, chain), Heard::GivenUp, "{what}");
    };
    given_up("a status outside", &|parts| {
        (
            vec![(parts.header, 16, NEXT, 1), (parts.data, 512, NEXT | WRITE, 2), (NOWHERE, 1, WRITE, 0)],
            vec![],
        )
    });
    given_up("no status", &|parts| (vec![(parts.header, 16, 0, 0)], vec![]));
    given_up("an empty status", &|parts| {
        (vec![(parts.header, 16, NEXT, 1), (parts.status, 0, WRITE, 0)], vec![])
    });
    given_up("an empty status after data", &|parts| {
        let data = (parts.data, 512, NEXT | WRITE, 2);
        (vec![(parts.header, 16, NEXT, 1), data, (parts.status, 0, WRITE, 0)], vec![])
    });
    given_up("a loop", &|parts| {
        (vec![(parts.header, 16, NEXT, 1), (parts.status, 1, WRITE | NEXT, 1)], vec![])
    });
    given_up("a link out of the table", &|parts| {
        (vec![(parts.header, 16, NEXT, 1), (parts.status, 1, WRITE | NEXT, SIZE)], vec![])
    });
    given_up("a table outside", &|_| (vec![(NOWHERE, 48, INDIRECT, 0)], vec![]));
    given_up("an empty table", &|parts| (vec![(parts.table, 0, INDIRECT, 0)], vec![]));
    given_up("a table that ends before its chain", &|parts| {
        let inner = vec![(parts.header, 16, NEXT, 1), (parts.status, 1, WRITE, 0)];
        (vec![(parts.table, 16, INDIRECT, 0)], inner)
    });
    given_up("a table in a table", &|parts| {
        let inner = vec![(parts.header, 16, NEXT, 1), (parts.table, 16, INDIRECT, 0)];
        (vec![(parts.table, 32, INDIRECT, 0)], inner)
    });
    given_up("a table and more", &|parts| {
        let inner = vec![(parts.header, 16, NEXT, 1), (parts.data, 512, WRITE, 0)];
        (vec![(parts.table, 32, INDIRECT | NEXT, 1), (parts.status, 1, WRITE, 0)], inner)
    });
}

/// Memory that comes later: the request waits for it, and is carried out by the vring that goes on.
#[test]
fn what_could_not_be_told_is_left_to_the_next() {
    let mut driver = Driver::new(SIZE, false, 0);
    let mut worker = Worker::new(driver.setup(device(), FEATURES), 1, Faults::default());
    let head = driver.add(IN, 3, &[], 512, false).unwrap();
    let status = driver.move_status(head, NOWHERE);
    worker.settle();
    assert!(worker.vring.is_broken() && driver.err.take());
    worker.vring.interrupt(StopMode::Restart);
    let stopped = worker.vring.stopped();
    assert_eq!(stopped, Stopped { next_avail: 1, unfinished: vec![head] });
    driver.move_status(head, status);
    let setup = VringSetup { unfinished: stopped.unfinished, ..driver.setup(device(), FEATURES) };
    let mut worker = Worker::new(setup, 1, Faults::default());
    worker.settle();
    assert_eq!(driver.harvest(), [(head, 513)]);
    assert_eq!(driver.status(head), OK);
}
