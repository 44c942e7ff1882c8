//! A queue of an export, as the worker that serves it sees it.

#![forbid(unsafe_code)]

use crate::block::{Errno, Op, Request};
use crate::ring::{Core, Io, Ring, UserData};

/// Where a slot's requests come from: one queue of one export.
///
/// A queue has a fixed number of tags. Each has one slot for as long as the queue lives, and one request at
/// most: `next`, carry out, `complete`, and again.
#[allow(async_fn_in_trait, reason = "a slot's future stays on its thread")]
pub trait Source<R: Ring> {
    /// What a tag keeps between the calls. It lives in the slot's future.
    type State: Default;

    /// Waits for the next request of `tag`. After `None` nothing more comes and the slot ends.
    async fn next<'a>(&'a self, io: &Io<R>, tag: u16, state: &'a mut Self::State) -> Option<Request<'a>>;

    /// Takes how the request of `tag` ended; once for each request. The client learns of it when the tag
    /// next waits, or at the end of the batch.
    fn complete(&self, tag: u16, state: &mut Self::State, result: Result<(), Errno>);

    /// Where its requests wait for limits; `None` for a queue that lets none out before it may go
    /// ([`Queue::poll_admitted`]).
    fn limit_wait(&self) -> Option<LimitWait>;
}

/// What a request does that has left its queue and is beyond the limits of its volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitWait {
    /// It waits in its slot until it may go.
    UntilAdmitted,
    /// It goes at once: somebody waits for it whom limits must not hold up.
    Lifted,
    /// It is somebody else's, who comes after us.
    ForEver,
}

/// A queue as its worker's loop drives it.
///
/// There are two kinds. The requests of one are **delivered**: each tag's slot waits in the kernel for its own, and the loop
/// has nothing to do. Those of the other lie in memory that is shared with the client, and are **polled**: when the
/// client kicks, and in each pass as long as it is active. What has a default here is of the second kind only, and
/// the default is what holds where there is nothing to poll.
pub trait Queue {
    /// For messages: which queue of what.
    fn label(&self) -> String;

    /// CPUs that its requests come from: a worker of such queues alone stays there. `None` where any will do.
    fn cpus(&self) -> Option<&[usize]>;

    /// Tags whose slots are there from the start. The other tags get theirs when they are first used, so that an idle
    /// queue has none.
    fn delivered_tags(&self) -> u16;

    /// Requests that were taken and not completed: a queue that [stops](Self::stop) is done when there are none. A queue
    /// whose requests are delivered is done when its slots have ended, and says 0.
    fn in_flight(&self) -> u16 {
        0
    }

    /// Tags in use: they are used last in, first out, so this is the number of the highest slot that is needed now.
    fn tags_in_use(&self) -> u16 {
        0
    }

    /// Has the ring say when the client brings something, as `user_data`.
    fn start<R: Ring>(&self, _core: &Core<R>, _user_data: UserData) {}

    /// A completion has come that may be of what [`start`](Self::start) asked for, and is the last one unless there are
    /// `more` to come. Whether it is this queue's, and not of one that had its number before.
    fn kicked<R: Ring>(&self, _core: &Core<R>, _user_data: UserData, _more: bool) -> bool {
        false
    }

    /// Begins a pass: shows the client what was completed since the last one, and tells it if that is due. Whether there
    /// was anything.
    fn begin_pass(&self) -> bool {
        false
    }

    /// Whether there is a request that this pass may take: the tag whose slot is to be polled, which takes it.
    fn poll(&self) -> Option<u16> {
        None
    }

    /// As [`poll`](Self::poll), of requests that have to be let in: `admit` is told what the next one asks for, and for how
    /// many bytes. One that it refuses stays in the queue with all that are behind it.
    fn poll_admitted(&self, _admit: impl FnOnce(Op, u64) -> bool) -> Option<u16> {
        None
    }

    /// Whether a request waits in the queue to be let in.
    fn is_held(&self) -> bool {
        false
    }

    /// Nothing has to be let in any more.
    fn forget_held(&self) {}

    /// Ends a pass: whether nothing has come for so long that the loop need not look here any more. It has asked for a kick
    /// then.
    fn try_idle(&self) -> bool {
        true
    }

    /// Asks for a kick at the next request, since the worker sleeps. False when there is a request already, which nobody will
    /// kick for.
    fn arm_kick(&self) -> bool {
        true
    }

    /// Whether the client may well bring more soon: looking for it instead of sleeping may pay.
    fn expects_more(&self) -> bool {
        false
    }

    /// Takes nothing more, for good. A queue whose requests are delivered is stopped by its client.
    fn stop(&self) {}

    /// Ends what [`start`](Self::start) began, and tells the client of everything that was completed.
    fn close<R: Ring>(&self, _core: &Core<R>) {}
}
