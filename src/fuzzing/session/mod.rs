//! Whole sessions: a VMM that says what it likes, shows and takes away what memory it likes, and whose guest writes what
//! it likes into its rings, all of it against a live session, with a worker of its own threads and real sockets.
//!
//! Whatever it does: the session answers or hangs up, and ends when the VMM is gone; nothing that the VMM showed stays
//! open or mapped; no request is used up without a status; and a neighbour on the same worker, a guest that behaves, is
//! served as ever.

mod driver;
mod guest;
mod messages;
mod neighbour;
mod world;

use super::Input;
use guest::Guest;

/// Sessions in one run: a VMM that dies and comes back brings its memory and its in-flight log along.
const SESSIONS: u32 = 3;

/// Any bytes: deeds of the VMM and of its guest.
pub fn session(bytes: &[u8]) {
    let mut input = Input(bytes);
    world::watched(|world| {
        let mut guest = Guest::new(world);
        let mut left = SESSIONS;
        while !input.is_empty() && left > 0 {
            match input.u8() % 20 {
                0 => guest.greet(&mut input),
                1 => guest.show_memory(&mut input),
                2 => guest.change_memory(&mut input),
                3 | 4 => guest.start_vring(&mut input),
                5 => guest.change_vring(&mut input),
                6 => guest.say_anything(&mut input),
                7 => guest.inflight(&mut input),
                8 => guest.configuration(&mut input),
                9 => guest.put_descriptor(&mut input),
                10 => guest.put_bytes(&mut input),
                11..=13 => guest.put_request(&mut input),
                14 => guest.move_avail(&mut input),
                15 => guest.kick(&mut input),
                16 => guest.wait(&mut input),
                17 => guest.take_memory_away(&mut input),
                18 => guest.abuse_event(&mut input),
                _ => {
                    left -= 1;
                    guest.leave(&mut input);
                    if left > 0 {
                        guest.come_back();
                    }
                }
            }
        }
    });
}
