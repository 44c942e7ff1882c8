//! The system calls that a running service makes, and no other.
//!
//! One that is not in the list fails with `EPERM` and the service goes on: it serves the disks of others, and that a
//! library takes a new call into use must not end them. The few that run or take over another program are not tried
//! by any library: whoever tries one is not us any more, and the process ends.
//!
//! The lists ask for numbers alone where calls are frequent: the kernel then knows the answer without running the
//! filter.

use super::{Error, Plan};
use crate::service::config::SandboxMode;
use libc::{self as nr, c_long};
use seccompiler::{
    BackendError, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;
use std::io;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Installs the filters. What they do, in a word.
pub(super) fn install(plan: &Plan) -> Result<String, Error> {
    let (refuse, deadly, what) = match plan.mode {
        SandboxMode::Log => (SeccompAction::Log, SeccompAction::Log, "log"),
        _ => (SeccompAction::Errno(libc::EPERM as u32), SeccompAction::KillProcess, "refuse"),
    };
    // One filter has one answer for what it lists and one for the rest, so there are several.
    let never = NEVER.iter().map(|number| (*number, Vec::new())).collect();
    // What a call's memory says no filter can see, and `clone3` has its flags there. The C library then uses `clone`.
    let unseen = [(nr::SYS_clone3, Vec::new())].into();
    let filters = [
        (never, SeccompAction::Allow, deadly),
        (unseen, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32)),
        (allowed(plan)?, refuse, SeccompAction::Allow),
    ];
    for (rules, otherwise, listed) in filters {
        let program = SeccompFilter::new(rules, otherwise, listed, architecture()?)
            .and_then(seccompiler::BpfProgram::try_from)
            .map_err(backend)?;
        match seccompiler::apply_filter_all_threads(&program) {
            Ok(()) => {}
            Err(seccompiler::Error::Seccomp(error)) if absent(&error) => {
                log::info!("sandbox: this kernel has no seccomp, so every system call is open: {error}");
                return Ok("none".into());
            }
            Err(error) => return Err(Error::new("seccomp")(io::Error::other(error))),
        }
    }
    Ok(what.into())
}

fn absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL))
}

fn backend(error: BackendError) -> Error {
    Error::new("seccomp")(io::Error::other(error))
}

fn architecture() -> Result<TargetArch, Error> {
    TargetArch::try_from(std::env::consts::ARCH).map_err(backend)
}

/// Programs run, taken over, or put into the kernel.
const NEVER: [c_long; 14] = [
    nr::SYS_execve,
    nr::SYS_execveat,
    nr::SYS_ptrace,
    nr::SYS_process_vm_readv,
    nr::SYS_process_vm_writev,
    nr::SYS_init_module,
    nr::SYS_finit_module,
    nr::SYS_delete_module,
    nr::SYS_kexec_load,
    nr::SYS_bpf,
    nr::SYS_mount,
    nr::SYS_pivot_root,
    nr::SYS_chroot,
    nr::SYS_setns,
];

/// Of every service.
const ALWAYS: &[c_long] = &[
    // Rings, files, sockets and events that are open.
    nr::SYS_io_uring_enter,
    nr::SYS_io_uring_setup,
    nr::SYS_io_uring_register,
    nr::SYS_read,
    nr::SYS_write,
    nr::SYS_readv,
    nr::SYS_writev,
    nr::SYS_pread64,
    nr::SYS_pwrite64,
    nr::SYS_preadv,
    nr::SYS_pwritev,
    nr::SYS_preadv2,
    nr::SYS_pwritev2,
    nr::SYS_lseek,
    nr::SYS_fsync,
    nr::SYS_fdatasync,
    nr::SYS_fallocate,
    nr::SYS_ftruncate,
    nr::SYS_fstat,
    nr::SYS_fstatfs,
    nr::SYS_flock,
    nr::SYS_fcntl,
    nr::SYS_close,
    nr::SYS_dup,
    nr::SYS_dup3,
    nr::SYS_accept4,
    nr::SYS_sendmsg,
    nr::SYS_recvmsg,
    nr::SYS_sendto,
    nr::SYS_recvfrom,
    nr::SYS_shutdown,
    nr::SYS_getsockopt,
    nr::SYS_setsockopt,
    nr::SYS_getsockname,
    nr::SYS_getpeername,
    nr::SYS_socketpair,
    nr::SYS_eventfd2,
    nr::SYS_pipe2,
    nr::SYS_memfd_create,
    nr::SYS_timerfd_create,
    nr::SYS_timerfd_settime,
    nr::SYS_epoll_create1,
    nr::SYS_epoll_ctl,
    nr::SYS_epoll_pwait,
    nr::SYS_epoll_pwait2,
    nr::SYS_ppoll,
    nr::SYS_pselect6,
    // Files by name, as far as landlock lets them; and what taking leave removes.
    nr::SYS_openat,
    nr::SYS_statx,
    nr::SYS_newfstatat,
    nr::SYS_faccessat,
    nr::SYS_faccessat2,
    nr::SYS_readlinkat,
    nr::SYS_getdents64,
    nr::SYS_unlinkat,
    nr::SYS_getcwd,
    // Memory.
    nr::SYS_mmap,
    nr::SYS_munmap,
    nr::SYS_mremap,
    nr::SYS_mprotect,
    nr::SYS_madvise,
    nr::SYS_mincore,
    nr::SYS_brk,
    // Threads, time and signals.
    nr::SYS_clone,
    nr::SYS_clone3,
    nr::SYS_set_robust_list,
    nr::SYS_rseq,
    nr::SYS_futex,
    nr::SYS_gettid,
    nr::SYS_getpid,
    nr::SYS_getppid,
    nr::SYS_getuid,
    nr::SYS_geteuid,
    nr::SYS_getgid,
    nr::SYS_getegid,
    nr::SYS_sched_yield,
    nr::SYS_sched_getaffinity,
    nr::SYS_sched_setaffinity,
    nr::SYS_getcpu,
    nr::SYS_membarrier,
    nr::SYS_exit,
    nr::SYS_exit_group,
    nr::SYS_restart_syscall,
    nr::SYS_nanosleep,
    nr::SYS_clock_nanosleep,
    nr::SYS_clock_gettime,
    nr::SYS_gettimeofday,
    nr::SYS_getrandom,
    nr::SYS_getrusage,
    nr::SYS_prlimit64,
    nr::SYS_sysinfo,
    nr::SYS_uname,
    nr::SYS_rt_sigaction,
    nr::SYS_rt_sigprocmask,
    nr::SYS_rt_sigreturn,
    nr::SYS_rt_sigpending,
    nr::SYS_sigaltstack,
    nr::SYS_capget,
];

/// The same under the names that only this machine has.
#[cfg(target_arch = "x86_64")]
const OLD: &[c_long] = &[
    nr::SYS_poll,
    nr::SYS_epoll_wait,
    nr::SYS_open,
    nr::SYS_stat,
    nr::SYS_lstat,
    nr::SYS_access,
    nr::SYS_readlink,
    nr::SYS_unlink,
    nr::SYS_dup2,
    nr::SYS_time,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[c_long] = &[];

/// Of a service with vhost-user exports, whose sessions are behind a private Unix socket; of one that may have to connect
/// to a server again, too.
const SOCKETS: &[c_long] = &[nr::SYS_connect, nr::SYS_bind, nr::SYS_listen];

/// Of a service that may have to look a host's name up.
const LOOKING_UP: &[c_long] = &[nr::SYS_sendmmsg, nr::SYS_recvmmsg, nr::SYS_fadvise64];

/// Of a service with ublk disks: their names are links in a directory.
const LINKING: &[c_long] = &[
    nr::SYS_symlinkat,
    nr::SYS_mkdirat,
    // And their requests' memory stays in memory, but not that of a guest of the same service.
    nr::SYS_mlock,
    nr::SYS_munlock,
    #[cfg(target_arch = "x86_64")]
    nr::SYS_symlink,
    #[cfg(target_arch = "x86_64")]
    nr::SYS_mkdir,
];

/// Of a service that may be given more sockets: each is made in a place of its own, with its mode and owner.
const MAKING: &[c_long] = &[
    nr::SYS_mkdirat,
    nr::SYS_fchmod,
    nr::SYS_fchmodat,
    nr::SYS_fchownat,
    nr::SYS_renameat,
    nr::SYS_renameat2,
    #[cfg(target_arch = "x86_64")]
    nr::SYS_mkdir,
];

/// What `ioctl` may do: ask about a terminal (the log's colours) and about a block device, make a descriptor
/// non-blocking or close-on-exec. Not, say, type into a terminal.
#[allow(clippy::unnecessary_cast, reason = "another C library has other types")]
const IOCTLS: [u64; 12] = [
    nr::TCGETS as u64,
    nr::FIONBIO as u64,
    nr::FIOCLEX as u64,
    nr::FIONREAD as u64,
    0x125e,      // BLKROGET
    0x1260,      // BLKGETSIZE
    0x1268,      // BLKSSZGET
    0x127b,      // BLKPBSZGET
    0x1278,      // BLKIOMIN
    0x1279,      // BLKIOOPT
    0x127c,      // BLKDISCARDZEROES
    0x8008_1272, // BLKGETSIZE64
];

/// A thread's name, what the kernel is told of a block server's threads, and names of memory (malloc's).
const PRCTLS: [u64; 4] = [
    nr::PR_SET_NAME as u64,
    nr::PR_GET_NAME as u64,
    nr::PR_SET_VMA as u64,
    57, // PR_SET_IO_FLUSHER
];

/// What kinds of sockets may be made: the first by all who make any, the others by who connects over TCP. Netlink is
/// how the C library learns which addresses there are.
const FAMILIES: [u64; 4] =
    [nr::AF_UNIX as u64, nr::AF_INET as u64, nr::AF_INET6 as u64, nr::AF_NETLINK as u64];

fn allowed(plan: &Plan) -> Result<Rules, Error> {
    let mut rules: Rules = ALWAYS.iter().chain(OLD).map(|number| (*number, Vec::new())).collect();
    if plan.vhost_user || plan.connects() {
        rules.extend(SOCKETS.iter().map(|number| (*number, Vec::new())));
        let families = if plan.ports.is_empty() { &FAMILIES[..1] } else { &FAMILIES };
        rules.insert(nr::SYS_socket, one_of(0, SeccompCmpArgLen::Dword, families)?);
    }
    if plan.names {
        rules.extend(LOOKING_UP.iter().map(|number| (*number, Vec::new())));
    }
    if plan.ublk {
        rules.extend(LINKING.iter().map(|number| (*number, Vec::new())));
    }
    if !plan.grow_in.is_empty() {
        rules.extend(MAKING.iter().map(|number| (*number, Vec::new())));
    }
    rules.insert(nr::SYS_ioctl, one_of(1, SeccompCmpArgLen::Dword, &IOCTLS)?);
    rules.insert(nr::SYS_prctl, one_of(0, SeccompCmpArgLen::Dword, &PRCTLS)?);
    // Threads, not processes, and no namespaces.
    let namespaces = nr::CLONE_NEWUSER
        | nr::CLONE_NEWNS
        | nr::CLONE_NEWPID
        | nr::CLONE_NEWNET
        | nr::CLONE_NEWIPC
        | nr::CLONE_NEWUTS
        | nr::CLONE_NEWCGROUP;
    let flags = SeccompCmpOp::MaskedEq((nr::CLONE_THREAD | namespaces) as u32 as u64);
    let thread = SeccompCondition::new(0, SeccompCmpArgLen::Qword, flags, nr::CLONE_THREAD as u64)
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(backend)?;
    rules.insert(nr::SYS_clone, vec![thread]);
    // `abort`, and what waits for it: to ourselves alone.
    let own = [u64::from(std::process::id())];
    rules.insert(nr::SYS_tgkill, one_of(0, SeccompCmpArgLen::Dword, &own)?);
    rules.insert(nr::SYS_kill, one_of(0, SeccompCmpArgLen::Dword, &own)?);
    Ok(rules)
}

/// The call is allowed when its argument `index` is one of `values`.
fn one_of(index: u8, len: SeccompCmpArgLen, values: &[u64]) -> Result<Vec<SeccompRule>, Error> {
    let rule = |value: &u64| {
        let condition = SeccompCondition::new(index, len.clone(), SeccompCmpOp::Eq, *value)?;
        SeccompRule::new(vec![condition])
    };
    values.iter().map(rule).collect::<Result<_, _>>().map_err(backend)
}
