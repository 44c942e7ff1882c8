//! What a VMM says of its vrings and of the configuration space, checked before the daemon hears of it: the daemon
//! acknowledges some of it and does something else.

use super::super::eventfd::check_eventfd;
use super::{Message, Regions};
use std::fs::File;
use vhost::vhost_user::message::{
    FrontendReq, VHOST_USER_CONFIG_SIZE, VhostUserConfig, VhostUserConfigFlags, VhostUserVringAddr,
    VhostUserVringState,
};
use vm_memory::ByteValued;

/// Of the number that comes with a vring's descriptor: its index.
const INDEX: u64 = 0xff;
/// No descriptor comes with it.
const NO_DESCRIPTOR: u64 = 0x100;

/// A device's queues and descriptors in each, at most.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// At least 1.
    pub queues: u16,
    /// A power of two.
    pub queue_size: u16,
}

/// Checks what `message` says, if it is about vrings or the configuration space.
///
/// # Errors
/// Why the message must not be carried out.
pub fn check(message: &mut Message, shape: Shape, regions: &Regions) -> Result<(), String> {
    use FrontendReq::*;
    match message.request {
        SET_VRING_NUM => {
            let num = state(message, shape)?;
            let most = shape.queue_size.into();
            if !num.is_power_of_two() {
                return Err(format!("a size of {num} is no power of two"));
            }
            if num > most {
                let all = format!("a size of {num} is more than the {most} of the export");
                // The largest of all vrings: virtio 1.3 section 2.7.
                let possible = num <= 1 << 15;
                let hint = format!(": give it queue-size={num}, or the VMM's device a queue-size of {most}");
                return Err(all + if possible { &hint } else { "" });
            }
        }
        SET_VRING_BASE => {
            let base = state(message, shape)?;
            if u16::try_from(base).is_err() {
                return Err(format!("index {base} has more than 16 bits"));
            }
        }
        SET_VRING_ENABLE => {
            let enable = state(message, shape)?;
            if enable > 1 {
                return Err(format!("{enable} is neither 0 nor 1"));
            }
        }
        GET_VRING_BASE => {
            state(message, shape)?;
        }
        SET_VRING_ADDR => address(message, shape, regions)?,
        SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => descriptor(message, shape)?,
        GET_CONFIG | SET_CONFIG => config(message)?,
        _ => {}
    }
    Ok(())
}

fn vring(index: u64, shape: Shape) -> Result<(), String> {
    match index < shape.queues.into() {
        true => Ok(()),
        false => Err(format!("vring {index}, of {} (the queues= of the export)", shape.queues)),
    }
}

/// A message's body, which is as long as its kind's: the relay has seen to that.
fn body<T: ByteValued + Default>(message: &Message) -> Result<T, String> {
    let mut body = T::default();
    let bytes = message.body.get(..size_of::<T>()).ok_or("too short")?;
    body.as_mut_slice().copy_from_slice(bytes);
    Ok(body)
}

/// The number that comes with a vring's index.
fn state(message: &Message, shape: Shape) -> Result<u32, String> {
    let state: VhostUserVringState = body(message)?;
    vring(state.index.into(), shape)?;
    Ok(state.num)
}

fn address(message: &Message, shape: Shape, regions: &Regions) -> Result<(), String> {
    let address: VhostUserVringAddr = body(message)?;
    vring(address.index.into(), shape)?;
    let flags = address.flags;
    if flags != 0 {
        // Its one flag asks for a log of what is written, which we do not offer.
        return Err(format!("flags {flags:#x} were not offered"));
    }
    if regions.is_empty() {
        return Err("there is no memory yet".into());
    }
    // Alignments: virtio 1.3 section 2.7.
    for (what, user, align) in [
        ("descriptor table", address.descriptor, 16),
        ("avail ring", address.available, 2),
        ("used ring", address.used, 4),
    ] {
        let Some(guest) = regions.guest_address(user) else {
            return Err(format!("its {what} at {user:#x} is in none of the VMM's regions"));
        };
        if !guest.is_multiple_of(align) {
            return Err(format!("its {what} at guest address {guest:#x} is no multiple of {align}"));
        }
    }
    Ok(())
}

fn descriptor(message: &mut Message, shape: Shape) -> Result<(), String> {
    let number = message.number();
    if number & !(INDEX | NO_DESCRIPTOR) != 0 {
        return Err(format!("{number:#x} has bits that mean nothing"));
    }
    vring(number & INDEX, shape)?;
    match (number & NO_DESCRIPTOR != 0, message.descriptors.pop()) {
        (true, None) if message.request == FrontendReq::SET_VRING_KICK => {
            Err("without a descriptor a vring has to be polled, which is not done here".into())
        }
        (true, None) => Ok(()),
        (true, Some(_)) => Err("with a descriptor, and it says that there is none".into()),
        (false, None) => Err("without its descriptor".into()),
        (false, Some(fd)) => {
            let file = File::from(fd);
            check_eventfd(&file).map_err(|error| error.to_string())?;
            message.descriptors.push(file.into());
            Ok(())
        }
    }
}

fn config(message: &Message) -> Result<(), String> {
    let head: VhostUserConfig = body(message)?;
    let (offset, size) = (head.offset, head.size);
    let bytes = message.body.len() - size_of::<VhostUserConfig>();
    if size as usize != bytes {
        return Err(format!("{size} bytes of configuration, and {bytes} come"));
    }
    if size == 0 || offset.checked_add(size).is_none_or(|end| end > VHOST_USER_CONFIG_SIZE) {
        return Err(format!("{size} bytes at {offset} of the configuration"));
    }
    let flags = head.flags;
    if VhostUserConfigFlags::from_bits(flags).is_none() {
        return Err(format!("flags {flags:#x} mean nothing"));
    }
    Ok(())
}
