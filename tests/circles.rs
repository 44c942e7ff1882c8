//! No two modules need each other, whether they say so or reach one another through what a parent re-exports.
//!
//! A module is a file. What a module and one of its own children have in common is theirs alone and does not count: a parent
//! declares its children, and they use its types. Tests may look wherever they like.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// What is not counted: the one place that names every driver, and which drivers name for their traits. A volume is any of
/// them, and a layer stands on any of them, so that circle is the tree itself.
const THE_LIST: &str = "engine::driver";

/// A module's path, such as `engine::nbd::pool`.
type Module = String;

/// The crate's modules, and their text without comments and tests.
fn modules() -> BTreeMap<Module, String> {
    fn walk(dir: &Path, path: &str, modules: &mut BTreeMap<Module, String>) {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let name = entry.file_name().into_string().unwrap();
            let stem = name.trim_end_matches(".rs");
            if stem == "tests" || stem == "main" {
                continue;
            }
            let own = match stem {
                "mod" | "lib" => path.to_owned(),
                _ if path.is_empty() => stem.to_owned(),
                _ => format!("{path}::{stem}"),
            };
            if entry.path().is_dir() {
                walk(&entry.path(), &own, modules);
            } else {
                modules.insert(own, code(&fs::read_to_string(entry.path()).unwrap()));
            }
        }
    }
    let mut modules = BTreeMap::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut modules);
    assert!(modules.len() > 100, "the sources were not found");
    modules
}

/// Without comments, and without what is for tests alone: the item after `#[cfg(test)]`, to the line that ends it.
fn code(text: &str) -> String {
    let mut kept = String::new();
    let mut lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    while let Some(line) = lines.next() {
        if line.trim() != "#[cfg(test)]" {
            kept.push_str(line);
            kept.push('\n');
            continue;
        }
        let indent = line.len() - line.trim_start().len();
        let ends = |line: &str| {
            let at_indent = line.len() - line.trim_start().len() == indent;
            at_indent && (line.ends_with('}') || line.ends_with(';') || line.ends_with(','))
        };
        lines.by_ref().find(|line| ends(line));
    }
    kept
}

/// Every path in `text` that begins at the crate, at a parent, or at the module itself, its braces written out.
fn paths(text: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for start in ["crate::", "super::", "self::"] {
        for (at, _) in text.match_indices(start) {
            let before = text[..at].chars().next_back();
            if before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':') {
                expand(&text[at..], &[], &mut found);
            }
        }
    }
    found
}

/// Reads one path, or a list of them in braces, and returns what follows it.
fn expand<'t>(mut text: &'t str, before: &[String], found: &mut Vec<Vec<String>>) -> &'t str {
    let mut path = before.to_vec();
    loop {
        let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
        path.extend((end > 0).then(|| text[..end].to_owned()));
        text = &text[end..];
        let Some(rest) = text.strip_prefix("::") else {
            found.push(path);
            return text;
        };
        text = rest;
        if let Some(mut list) = text.strip_prefix('{') {
            loop {
                list = expand(list.trim_start(), &path, found).trim_start();
                // `as name`, `*` and what else there may be.
                list = &list[list.find([',', '}']).unwrap_or(list.len())..];
                match list.strip_prefix(',').map(str::trim_start) {
                    Some(rest) if !rest.starts_with('}') => list = rest,
                    Some(rest) => return rest.strip_prefix('}').unwrap_or(rest),
                    None => return list.strip_prefix('}').unwrap_or(list),
                }
            }
        }
    }
}

/// The module that a path leads to, seen from `own`: re-exports followed.
fn lead(modules: &BTreeMap<Module, String>, own: &str, path: &[String], depth: usize) -> Option<Module> {
    let mut at: Vec<&str> = own.split("::").filter(|part| !part.is_empty()).collect();
    let mut rest = path;
    while let Some(first) = rest.first() {
        match first.as_str() {
            "crate" => at.clear(),
            "super" => drop(at.pop()),
            "self" => {}
            _ => break,
        }
        rest = &rest[1..];
    }
    while let Some(first) = rest.first() {
        let child = [at.as_slice(), &[first.as_str()]].concat();
        if !modules.contains_key(&child.join("::")) {
            break;
        }
        at = child;
        rest = &rest[1..];
    }
    let module = at.join("::");
    let text = modules.get(&module)?;
    if let Some(name) = rest.first()
        && depth < 8
    {
        // Where the name comes from, if the module only passes it on.
        for line in text.split(';').filter_map(|item| item.split_once("pub").map(|(_, rest)| rest)) {
            let Some(used) = line.split_once("use ").map(|(_, used)| used) else { continue };
            let mut passed = Vec::new();
            expand(used.trim(), &[], &mut passed);
            if let Some(path) = passed.iter().find(|path| path.last() == Some(name)) {
                let first = path.first().map_or("", String::as_str);
                let from = if ["crate", "super", "self"].contains(&first) {
                    path.clone()
                } else {
                    [vec!["self".to_owned()], path.clone()].concat()
                };
                return lead(modules, &module, &from, depth + 1);
            }
        }
    }
    Some(module)
}

/// Whether one is above the other in the tree of modules.
fn kin(one: &str, other: &str) -> bool {
    let below = |child: &str, parent: &str| {
        parent.is_empty() || child == parent || child.starts_with(&format!("{parent}::"))
    };
    below(one, other) || below(other, one)
}

/// Which modules each one uses.
fn uses(modules: &BTreeMap<Module, String>) -> BTreeMap<Module, BTreeSet<Module>> {
    assert!(modules.contains_key(THE_LIST));
    let of = |(own, text): (&Module, &String)| {
        if own == THE_LIST {
            return (own.clone(), BTreeSet::new());
        }
        let found = paths(text).into_iter().filter_map(|path| lead(modules, own, &path, 0));
        (own.clone(), found.filter(|other| !kin(own, other)).collect())
    };
    modules.iter().map(of).collect()
}

/// All that can be reached from a module.
fn reached(uses: &BTreeMap<Module, BTreeSet<Module>>, from: &str) -> BTreeSet<Module> {
    let (mut seen, mut next) = (BTreeSet::new(), vec![from.to_owned()]);
    while let Some(module) = next.pop() {
        next.extend(uses[&module].iter().filter(|other| seen.insert((*other).clone())).cloned());
    }
    seen
}

#[test]
fn no_two_modules_need_each_other() {
    let uses = uses(&modules());
    assert!(uses.values().map(BTreeSet::len).sum::<usize>() > 300, "the imports were not found");
    let reached: BTreeMap<_, _> = uses.keys().map(|module| (module, reached(&uses, module))).collect();
    let mut circles: BTreeSet<BTreeSet<&Module>> = BTreeSet::new();
    for (module, others) in &reached {
        if others.contains(*module) {
            circles.insert(others.iter().filter(|other| reached[other].contains(*module)).collect());
        }
    }
    let edges = |circle: &BTreeSet<&Module>| {
        let inner = circle.iter().flat_map(|module| {
            let inside = uses[*module].iter().filter(|other| circle.contains(other));
            inside.map(move |other| format!("  {module} uses {other}"))
        });
        inner.collect::<Vec<_>>().join("\n")
    };
    let text: Vec<_> = circles.iter().map(edges).collect();
    assert!(circles.is_empty(), "modules that need each other:\n{}", text.join("\n\n"));
}

#[test]
fn paths_are_read_as_the_compiler_reads_them() {
    let text = "use crate::a::{b, c::{D, E as F}, self};\nlet x = super::y::z(1); mycrate::no();";
    let found: BTreeSet<String> = paths(text).iter().map(|path| path.join("::")).collect();
    let expected = ["crate::a::b", "crate::a::c::D", "crate::a::c::E", "crate::a::self", "super::y::z"];
    assert_eq!(found, expected.iter().map(|path| (*path).to_owned()).collect());
}
