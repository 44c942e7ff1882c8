//! The memory a VMM shows us, checked before it is mapped.

use super::Message;
use rustix::fs::{FileType, fstat, fstatfs};
use std::os::fd::OwnedFd;
use vhost::vhost_user::message::{FrontendReq, VhostUserMemory, VhostUserMemoryRegion};
use vm_memory::ByteValued;

/// What vhost-user-backend answers to GET_MAX_MEM_SLOTS, and does not hold anybody to.
const MAX_REGIONS: usize = 509;

/// All of a VMM's memory, in bytes: 16 TiB. A process has 128 TiB of addresses, for all exports together.
const MAX_BYTES: u64 = 16 << 40;

/// Of `statfs(2)`: a file system whose pages some process provides, when it likes. A worker that touches one may wait
/// for ever.
const FUSE: i64 = 0x6573_5546;

/// Which memory a VMM shows: what counts against the limits.
#[derive(Clone, Debug, Default)]
pub struct Regions {
    /// First guest address, bytes.
    held: Vec<(u64, u64)>,
}

impl Regions {
    /// What it would show after `message`; `None` for a message that is not about memory.
    ///
    /// # Errors
    /// Why the message must not be carried out.
    pub fn after(&self, message: &Message) -> Result<Option<Regions>, String> {
        let body = message.body.as_slice();
        let next = match message.request {
            FrontendReq::SET_MEM_TABLE => {
                let (head, table) = body.split_at_checked(size_of::<VhostUserMemory>()).ok_or("too short")?;
                let count = head.first_chunk().map_or(0, |count| u32::from_ne_bytes(*count)) as usize;
                let entry = size_of::<VhostUserMemoryRegion>();
                if table.len() != count * entry || message.descriptors.len() != count {
                    let (bytes, files) = (table.len(), message.descriptors.len());
                    return Err(format!("{count} regions in {bytes} bytes with {files} descriptors"));
                }
                let mut held = Vec::with_capacity(count);
                for (bytes, file) in table.chunks_exact(entry).zip(&message.descriptors) {
                    held.push(check(&region(bytes), Some(file))?);
                }
                Regions { held }
            }
            FrontendReq::ADD_MEM_REG => {
                let mut next = self.clone();
                next.held.push(check(&single(body), message.descriptors.first())?);
                next
            }
            FrontendReq::REM_MEM_REG => {
                let gone = check(&single(body), None)?;
                let mut next = self.clone();
                next.held.retain(|held| *held != gone);
                next
            }
            _ => return Ok(None),
        };
        if next.held.len() > MAX_REGIONS {
            return Err(format!("more than {MAX_REGIONS} regions"));
        }
        let bytes = next.held.iter().fold(0, |all: u64, (_, bytes)| all.saturating_add(*bytes));
        if bytes > MAX_BYTES {
            return Err(format!("{bytes} bytes of memory are more than {MAX_BYTES}"));
        }
        Ok(Some(next))
    }
}

/// A region in a table.
fn region(bytes: &[u8]) -> VhostUserMemoryRegion {
    let mut region = VhostUserMemoryRegion::default();
    region.as_mut_slice().copy_from_slice(bytes);
    region
}

/// A region that comes alone, after 64 bits of padding.
fn single(body: &[u8]) -> VhostUserMemoryRegion {
    region(&body[body.len() - size_of::<VhostUserMemoryRegion>()..])
}

/// Where it begins and its length, when it can be mapped: by the file it comes with, if it needs one.
fn check(region: &VhostUserMemoryRegion, file: Option<&OwnedFd>) -> Result<(u64, u64), String> {
    let (start, bytes) = (region.guest_phys_addr, region.memory_size);
    let (user, offset) = (region.user_addr, region.mmap_offset);
    let complain = |what: String| Err(format!("region at {start:#x} of {bytes} bytes: {what}"));
    if bytes == 0 {
        return complain("nothing in it".into());
    }
    for (what, from) in [("guest", start), ("VMM", user), ("file", offset)] {
        if from.checked_add(bytes).is_none() {
            return complain(format!("its {what} addresses wrap around from {from:#x}"));
        }
    }
    let Some(file) = file else { return Ok((start, bytes)) };
    let stat = match fstat(file) {
        Ok(stat) => stat,
        Err(error) => return complain(format!("its file: {error}")),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return complain("it is not in a regular file".into());
    }
    match fstatfs(file) {
        Ok(system) if system.f_type == FUSE => {
            return complain("its file is on FUSE, where another process provides the pages".into());
        }
        Ok(_) => {}
        Err(error) => return complain(format!("its file system: {error}")),
    }
    // Touching what is missing would be a SIGBUS.
    let length = u64::try_from(stat.st_size).unwrap_or(0);
    if offset + bytes > length {
        return complain(format!("it starts at {offset} in a file of {length}"));
    }
    Ok((start, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::fs::File;
    use std::os::unix::net::UnixStream;
    use vhost::vhost_user::message::VhostUserMemoryRegion as Region;

    const MIB: u64 = 1 << 20;
    const AT: u64 = 0x7f00_0000_0000;

    fn memfd(bytes: u64) -> OwnedFd {
        let file = File::from(memfd_create(c"memory", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(bytes).unwrap();
        file.into()
    }

    fn message(request: FrontendReq, regions: &[Region], descriptors: Vec<OwnedFd>) -> Message {
        let count = if request == FrontendReq::SET_MEM_TABLE { regions.len() as u64 } else { 0 };
        let mut body = count.to_ne_bytes().to_vec();
        regions.iter().for_each(|region| body.extend_from_slice(region.as_slice()));
        Message { request, need_reply: false, body, descriptors }
    }

    fn add(regions: &Regions, region: Region, file: OwnedFd) -> Result<Option<Regions>, String> {
        regions.after(&message(FrontendReq::ADD_MEM_REG, &[region], vec![file]))
    }

    #[test]
    fn what_wraps_or_is_empty_is_refused() {
        let none = Regions::default();
        let cases = [
            ("nothing in it", Region::new(MIB, 0, AT, 0)),
            ("guest addresses wrap", Region::new(!4095, MIB, AT, 0)),
            ("VMM addresses wrap", Region::new(MIB, MIB, !4095, 0)),
            ("file addresses wrap", Region::new(MIB, MIB, AT, !4095)),
            ("guest addresses wrap", Region::new(MIB, !4095, AT, 0)),
            ("in a file of 1048576", Region::new(MIB, MIB + 1, AT, 0)),
            ("in a file of 1048576", Region::new(MIB, MIB, AT, 4096)),
        ];
        for (why, region) in cases {
            let error = add(&none, region, memfd(MIB)).unwrap_err();
            assert!(error.contains(why), "{error}");
            let table = message(FrontendReq::SET_MEM_TABLE, &[region], vec![memfd(MIB)]);
            assert!(none.after(&table).unwrap_err().contains(why));
            // What is taken away comes without a file, and must not wrap either.
            let gone = none.after(&message(FrontendReq::REM_MEM_REG, &[region], vec![]));
            assert_eq!(gone.is_err(), !why.contains("in a file"), "{why}");
        }
        assert!(add(&none, Region::new(MIB, MIB, AT, 0), memfd(MIB)).unwrap().is_some());
    }

    #[test]
    fn memory_is_in_a_regular_file() {
        let region = Region::new(MIB, 4096, AT, 0);
        let dir = File::open("/proc/self").unwrap();
        let null = File::open("/dev/null").unwrap();
        let socket = UnixStream::pair().unwrap().0;
        for file in [OwnedFd::from(dir), null.into(), socket.into()] {
            let error = add(&Regions::default(), region, file).unwrap_err();
            assert!(error.contains("not in a regular file"), "{error}");
        }
    }

    #[test]
    fn a_table_says_how_many_regions_it_has() {
        let regions = [Region::new(MIB, MIB, AT, 0), Region::new(4 * MIB, MIB, AT + 4 * MIB, 0)];
        let none = Regions::default();
        let whole = message(FrontendReq::SET_MEM_TABLE, &regions, vec![memfd(MIB), memfd(MIB)]);
        assert_eq!(none.after(&whole).unwrap().unwrap().held, [(MIB, MIB), (4 * MIB, MIB)]);
        for count in [0, 1, 3, 300, u32::MAX] {
            let mut message = message(FrontendReq::SET_MEM_TABLE, &regions, vec![memfd(MIB), memfd(MIB)]);
            message.body[..4].copy_from_slice(&count.to_ne_bytes());
            assert!(none.after(&message).is_err(), "{count}");
        }
        let fewer = message(FrontendReq::SET_MEM_TABLE, &regions, vec![memfd(MIB)]);
        assert!(none.after(&fewer).is_err());
    }

    #[test]
    fn a_vmm_has_its_share_of_addresses() {
        let mut regions = Regions::default();
        let file = memfd(4096);
        let place = |index: u64| Region::new(index << 20, 4096, AT + (index << 20), 0);
        for index in 0..MAX_REGIONS as u64 {
            regions = add(&regions, place(index), file.try_clone().unwrap()).unwrap().unwrap();
        }
        let one_more = || add(&regions, place(600), file.try_clone().unwrap());
        assert!(one_more().unwrap_err().contains("more than 509"));
        // Those that are gone do not count.
        let gone = regions.after(&message(FrontendReq::REM_MEM_REG, &[place(7)], vec![])).unwrap().unwrap();
        assert!(add(&gone, place(600), file.try_clone().unwrap()).is_ok());

        let large = || memfd(MAX_BYTES);
        let first = add(&Regions::default(), Region::new(0, MAX_BYTES, 0, 0), large()).unwrap().unwrap();
        let second = Region::new(MAX_BYTES, 4096, MAX_BYTES, 0);
        assert!(add(&first, second, large()).unwrap_err().contains("bytes of memory"));
    }
}
