//! The one request at a time that counts an image's clusters.

#![forbid(unsafe_code)]

use super::claims::until;
use super::image::Image;
use super::refcounts::Refcounts;
use crate::block::Errno;
use crate::ring::{Io, Ring};
use std::ops::{Deref, DerefMut};
use std::sync::PoisonError;

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
