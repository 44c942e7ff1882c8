//! The rules of the house, held by a test: who may import whom, where `unsafe` may be, and that the documentation's links
//! lead somewhere.

use std::fs;
use std::path::{Path, PathBuf};

/// Modules in import order: each may use itself and those before it.
const ORDER: [&str; 12] = [
    "log_limit",
    "escape",
    "users",
    "block",
    "stats",
    "ring",
    "engine",
    "frontend",
    "worker",
    "service",
    "image",
    "cli",
];

/// Files that may contain `unsafe`, with the reason.
const UNSAFE: [(&str, &str); 10] = [
    ("block/iovec.rs", "making a range of memory is a promise"),
    ("stats/clock.rs", "the processor's counter"),
    ("ring/", "what the kernel is given must stay valid"),
    ("frontend/ublk/queue.rs", "the kernel's descriptors are mapped memory"),
    ("frontend/ublk/descriptor.rs", "as above"),
    ("frontend/vhost_user/memory.rs", "guest memory is mapped memory"),
    ("frontend/vhost_user/split_ring.rs", "as above"),
    ("frontend/vhost_user/sigbus/mod.rs", "a signal handler that puts memory in the place of what is gone"),
    ("frontend/vhost_user/inflight/mod.rs", "its notes are shared memory"),
    ("frontend/vhost_user/vring/", "as above, and its tests play the guest"),
];

/// Every Rust file of the crate with its path below `src`.
fn sources() -> Vec<(String, String)> {
    fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, &mut files);
    assert!(files.len() > 20, "the sources were not found");
    files
        .into_iter()
        .map(|file| {
            let name = file.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
            (name, fs::read_to_string(&file).unwrap())
        })
        .collect()
}

/// The module of `src` a file belongs to.
fn module(file: &str) -> Option<usize> {
    let first = file.split('/').next()?.trim_end_matches(".rs");
    ORDER.iter().position(|module| *module == first)
}

#[test]
fn imports_run_one_way() {
    let (engine, frontend) = (module("engine/"), module("frontend/"));
    let mut seen = 0;
    for (file, text) in sources() {
        let Some(own) = module(&file) else { continue };
        for used in text.split("crate::").skip(1) {
            let name: String = used.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
            let Some(other) = module(&name) else { continue };
            seen += 1;
            assert!(other <= own, "src/{file} uses {name}, which is above it");
            let apart = Some(own) == frontend && Some(other) == engine;
            assert!(!apart, "src/{file} uses {name}: a frontend does not know what a volume is");
        }
    }
    assert!(seen > 50, "the imports were not found");
}

#[test]
fn unsafe_is_where_it_belongs() {
    let sources = sources();
    for (file, text) in &sources {
        let allowed = UNSAFE.iter().any(|(prefix, _)| file.starts_with(prefix));
        if allowed {
            for (number, line) in text.lines().enumerate() {
                let opens = line.trim_start().starts_with("unsafe impl")
                    || (line.contains("unsafe {") && !line.trim_start().starts_with("//"));
                if !opens {
                    continue;
                }
                let before = text.lines().take(number).collect::<Vec<_>>();
                let reason = before.iter().rev().take(8).any(|line| line.contains("// SAFETY:"));
                assert!(reason, "src/{file}:{}: unsafe without its SAFETY reason", number + 1);
            }
        } else {
            // A module's attribute holds for all below it. One whose children may be unsafe cannot have it,
            // and must do without.
            let forbids = |name: &str| {
                sources.iter().any(|(file, text)| file == name && text.contains("#![forbid(unsafe_code)]"))
            };
            let above = file.match_indices('/').map(|(at, _)| &file[..at]);
            let covered = forbids(file)
                || above
                    .into_iter()
                    .any(|dir| forbids(&format!("{dir}/mod.rs")) || forbids(&format!("{dir}.rs")));
            let parent = file.ends_with("/mod.rs") || file == "lib.rs";
            let free =
                !text.contains("unsafe {") && !text.contains("unsafe fn") && !text.contains("unsafe impl");
            assert!(covered || (parent && free), "src/{file} does not forbid unsafe code");
        }
    }
}

/// The targets of a text's links that are files of ours.
fn links(text: &str) -> impl Iterator<Item = &str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(target, _)| target));
    targets.filter(|target| !target.contains("://"))
}

/// What a heading is called in a link.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).collect::<String>().replace(' ', "-")
}

#[test]
fn links_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let of = |dir: &Path| {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect::<Vec<_>>()
    };
    let pages = [of(root), of(&root.join("docs")), of(&root.join("tests"))].concat();
    assert!(pages.len() > 8, "the pages were not found");
    for page in pages {
        for link in links(&fs::read_to_string(&page).unwrap()) {
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { page.clone() } else { page.parent().unwrap().join(path) };
            assert!(target.exists(), "{}: {link}", page.display());
            if !heading.is_empty() {
                let text = fs::read_to_string(&target).unwrap();
                let found = text.lines().filter_map(|line| line.strip_prefix('#'));
                let found = found.map(|line| anchor(line.trim_start_matches('#').trim()));
                assert!(found.into_iter().any(|found| found == heading), "{}: {link}", page.display());
            }
        }
    }
}
