//! The one request at a time that counts an image's clusters.

#![forbid(unsafe_code)]

use super::image::Image;
use super::refcounts::Refcounts;
use crate::block::Errno;
use crate::engine::until::until;
use crate::ring::{Io, Ring};
use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::PoisonError;
use std::thread;
use std::time::{Duration, Instant};

/// The counts, as long as one request has them.
pub struct Owner<'a> {
    image: &'a Image,
    refcounts: Option<Box<Refcounts>>,
}

impl<'a> Owner<'a> {
    /// Waits for them.
    ///
    /// # Errors
    /// `EROFS` where the image has none, because it is only read; see [`until`].
    pub async fn of<R: Ring>(io: &Io<R>, image: &'a Image) -> Result<Owner<'a>, Errno> {
        let take = || image.owner.lock().unwrap_or_else(PoisonError::into_inner).take();
        let refcounts = Some(until(io, take).await?);
        Ok(Owner { image, refcounts })
    }

    /// Waits for them, on a thread that may.
    ///
    /// # Errors
    /// When somebody else has them for longer than `patience`.
    pub fn wait(image: &'a Image, patience: Duration) -> io::Result<Owner<'a>> {
        let deadline = Instant::now() + patience;
        loop {
            let refcounts = image.owner.lock().unwrap_or_else(PoisonError::into_inner).take();
            match refcounts {
                Some(_) => return Ok(Owner { image, refcounts }),
                None if Instant::now() > deadline => return Err(io::ErrorKind::ResourceBusy.into()),
                None => thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

impl Drop for Owner<'_> {
    fn drop(&mut self) {
        *self.image.owner.lock().unwrap_or_else(PoisonError::into_inner) = self.refcounts.take();
    }
}

impl Deref for Owner<'_> {
    type Target = Refcounts;

    fn deref(&self) -> &Refcounts {
        // It is there until it is dropped.
        self.refcounts.as_deref().unwrap_or_else(|| unreachable!("an owner has what it owns"))
    }
}

impl DerefMut for Owner<'_> {
    fn deref_mut(&mut self) -> &mut Refcounts {
        self.refcounts.as_deref_mut().unwrap_or_else(|| unreachable!("an owner has what it owns"))
    }
}
