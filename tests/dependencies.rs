//! What we build upon: from where it comes, and under which terms. What only other systems need is not looked at.

use std::process::Command;

/// Terms that let a binary with the code in it be used and passed on by anybody.
const ALLOWED: [&str; 9] = [
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "MIT",
    // Changes to such files are to be published, and we make none.
    "MPL-2.0",
    "MPL-2.0+",
    "Unicode-3.0",
    "Zlib",
];

/// Whether an SPDX expression leaves a choice that is allowed. Older crates write "/" for "OR".
fn allowed(expression: &str) -> bool {
    let plain = expression.replace(['(', ')'], "").replace('/', " OR ");
    plain.split(" AND ").all(|all| all.split(" OR ").any(|one| ALLOWED.contains(&one.trim())))
}

#[test]
fn a_choice_must_be_left() {
    for good in ["MIT", "MIT/Apache-2.0", "GPL-2.0 OR MIT", "(MIT OR Apache-2.0) AND Unicode-3.0"] {
        assert!(allowed(good), "{good}");
    }
    for bad in ["", "GPL-3.0-only", "MIT AND GPL-2.0-only", "BUSL-1.1"] {
        assert!(!allowed(bad), "{bad}");
    }
}

#[test]
fn crates_come_from_the_registry_under_free_terms() {
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let arguments =
        ["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform", &platform];
    let output =
        Command::new(env!("CARGO")).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 50, "they are not all there");
    for package in packages.iter().filter(|package| package["name"] != env!("CARGO_PKG_NAME")) {
        let (name, version) = (&package["name"], &package["version"]);
        let source = package["source"].as_str().unwrap_or("a path");
        assert!(source.starts_with("registry+"), "{name} {version} comes from {source}");
        let license = package["license"].as_str().unwrap_or("");
        assert!(allowed(license), "{name} {version}: the licence is {license:?}");
    }
}
