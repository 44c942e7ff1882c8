//! The driver's control commands, one function for each that we use, on a ring that can be given up on.
//!
//! libublk has most of them too, but waits for each without an end, deletes the device of a number that it was
//! refused, passes no flag that it does not know, and writes to standard error when it meets a device that it has
//! not added itself. What is used of it are the ABI's types and numbers, and its question for features.

#![forbid(unsafe_code)]

use super::features::CONTROL;
use super::info::Info;
use super::params::{self, Params};
use crate::block::Errno;
use crate::ring::CommandRing;
use libublk::sys;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

/// Why a command did not do what it was to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failed {
    /// The kernel said no.
    Refused(Errno),
    /// It was given up. The kernel may carry it out all the same.
    NoAnswer,
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Failed {
        Failed::Refused(error.into())
    }
}

/// Bytes of the CPU mask that the kernel is asked for: it wants room for as many CPUs as it could have.
const CPU_MASK: usize = 1024;

/// The control device and a ring for its commands, which belongs to the thread that opened it. Dropping it cancels
/// a command that was given up.
pub(super) struct ControlDevice {
    control: File,
    ring: CommandRing,
}

impl ControlDevice {
    /// Opens the control device.
    ///
    /// # Errors
    /// When there is none, or none for us, or no io_uring.
    pub fn open() -> io::Result<ControlDevice> {
        let control = File::options().read(true).write(true).open(CONTROL)?;
        Ok(ControlDevice { control, ring: CommandRing::new()? })
    }

    /// Adds the device that `spec` describes (id `u32::MAX`: the kernel picks); what it became.
    ///
    /// # Errors
    /// `EEXIST` for a number that is taken.
    pub fn add(&mut self, spec: &Info, go_on: impl FnMut() -> bool) -> Result<Info, Failed> {
        let payload = self.run(sys::UBLK_U_CMD_ADD_DEV, spec.id, 0, spec.bytes(), go_on)?;
        Info::read(&payload).ok_or(Failed::Refused(Errno::EIO))
    }

    /// What the driver knows of device `id`.
    ///
    /// # Errors
    /// `ENODEV` where there is none, `EINVAL` for one that was added without privileges.
    pub fn info(&mut self, id: u32, go_on: impl FnMut() -> bool) -> Result<Info, Failed> {
        let room = vec![0; Info::LEN].into();
        let payload = self.run(sys::UBLK_U_CMD_GET_DEV_INFO, id, 0, room, go_on)?;
        Info::read(&payload).ok_or(Failed::Refused(Errno::EIO))
    }

    /// The parameters of device `id`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn params(&mut self, id: u32, go_on: impl FnMut() -> bool) -> Result<Params, Failed> {
        let mut room = vec![0; params::LEN];
        room[0..4].copy_from_slice(&(params::LEN as u32).to_ne_bytes());
        let payload = self.run(sys::UBLK_U_CMD_GET_PARAMS, id, 0, room.into(), go_on)?;
        Params::read(&payload).ok_or(Failed::Refused(Errno::EIO))
    }

    /// Sets the parameters of a device that was never started.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_params(
        &mut self,
        id: u32,
        params: &Params,
        go_on: impl FnMut() -> bool,
    ) -> Result<(), Failed> {
        self.run(sys::UBLK_U_CMD_SET_PARAMS, id, 0, params.bytes(), go_on).map(drop)
    }

    /// CPUs whose requests come to `queue` of device `id`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn affinity(&mut self, id: u32, queue: u16) -> Result<Vec<usize>, Failed> {
        let room = vec![0; CPU_MASK / 8].into();
        let mask = self.run(sys::UBLK_U_CMD_GET_QUEUE_AFFINITY, id, queue.into(), room, || true)?;
        Ok(set_bits(&mask))
    }

    /// A command with nothing but a number: what `data` is depends on `op`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn plain(&mut self, op: u32, id: u32, data: u64, go_on: impl FnMut() -> bool) -> Result<(), Failed> {
        self.run(op, id, data, Box::default(), go_on).map(drop)
    }

    fn run(
        &mut self,
        op: u32,
        id: u32,
        data: u64,
        payload: Box<[u8]>,
        go_on: impl FnMut() -> bool,
    ) -> Result<Box<[u8]>, Failed> {
        let len = payload.len() as u16;
        let command = |addr| command(id, if len > 0 { addr } else { 0 }, len, data);
        match self.ring.run(self.control.as_fd(), op, payload, command, go_on)? {
            Some((result, payload)) => match Errno::split(result) {
                Ok(_) => Ok(payload),
                Err(errno) => Err(Failed::Refused(errno)),
            },
            None => Err(Failed::NoAnswer),
        }
    }
}

/// `struct ublksrv_ctrl_cmd` of `linux/ublk_cmd.h`, with room behind it.
fn command(id: u32, addr: u64, len: u16, data: u64) -> [u8; 80] {
    let mut bytes = [0; 80];
    bytes[0..4].copy_from_slice(&id.to_ne_bytes());
    // No queue: it is a command for the device.
    bytes[4..6].copy_from_slice(&u16::MAX.to_ne_bytes());
    bytes[6..8].copy_from_slice(&len.to_ne_bytes());
    bytes[8..16].copy_from_slice(&addr.to_ne_bytes());
    bytes[16..24].copy_from_slice(&data.to_ne_bytes());
    bytes
}

const _: () = {
    use std::mem::offset_of;
    type Command = sys::ublksrv_ctrl_cmd;
    assert!(size_of::<Command>() == 32);
    assert!(offset_of!(Command, dev_id) == 0 && offset_of!(Command, queue_id) == 4);
    assert!(offset_of!(Command, len) == 6 && offset_of!(Command, addr) == 8);
    assert!(offset_of!(Command, data) == 16);
};

/// Positions of the bits that are set in a mask of `unsigned long`s, of which the kernel's are little-endian in
/// memory on the machines that we run on.
fn set_bits(mask: &[u8]) -> Vec<usize> {
    (0..mask.len() * 8).filter(|bit| mask[bit / 8] >> (bit % 8) & 1 == 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_laid_out_as_the_kernel_reads_it() {
        let bytes = command(7, 0x1000, 64, 99);
        let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!(u32::from_ne_bytes(bytes[0..4].try_into().unwrap()), 7);
        assert_eq!(&bytes[4..6], [0xff, 0xff]);
        assert_eq!(u16::from_ne_bytes(bytes[6..8].try_into().unwrap()), 64);
        assert_eq!((word(8), word(16)), (0x1000, 99));
        assert!(bytes[24..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_mask_is_a_list_of_cpus() {
        assert_eq!(set_bits(&[0b1000_0001, 0, 0b10]), [0, 7, 17]);
        assert!(set_bits(&[0; 128]).is_empty());
    }
}
