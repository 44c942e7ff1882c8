//! How many instructions a case takes: the same on a busy machine as on a quiet one.
//!
//! This program runs itself under callgrind twice, with a different number of batches, and takes the difference: what
//! goes before and after falls out. A worker's cases are not counted: callgrind runs one thread at a time, and lets
//! no other run while one sleeps in `io_uring_enter` (valgrind 3.19).

use super::cases::{CASES, Case};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

/// `--count NAME BATCHES`: be counted.
pub const FLAG: &str = "--count";

const FEW: u64 = 200;
const MANY: u64 = 1200;

/// Whether instructions can be counted, or why not.
pub fn available() -> Result<(), String> {
    let valgrind = Command::new("valgrind").arg("--version").stdout(Stdio::null()).status();
    match valgrind {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("valgrind ends with {status}")),
        Err(error) => Err(format!("valgrind is missing ({error})")),
    }
}

/// What is counted.
pub fn work(name: &str, batches: &str) -> ExitCode {
    let case = CASES.iter().find(|case| case.name == name);
    let (Some(case), Ok(batches)) = (case, batches.parse::<u64>()) else { return ExitCode::FAILURE };
    let mut run = (case.make)();
    (0..batches).for_each(|_| run.batch());
    ExitCode::SUCCESS
}

/// User-space instructions for one request.
pub fn measure(case: &Case) -> Result<f64, String> {
    let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
    let few = instructions(dir.path(), case, FEW)?;
    let many = instructions(dir.path(), case, MANY)?;
    Ok(many.saturating_sub(few) as f64 / (MANY - FEW) as f64 / f64::from(case.requests))
}

fn instructions(dir: &Path, case: &Case, batches: u64) -> Result<u64, String> {
    let file = dir.join(batches.to_string());
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--quiet"])
        .arg(format!("--callgrind-out-file={}", file.display()))
        .arg(std::env::current_exe().map_err(|error| error.to_string())?)
        .args([FLAG, case.name, &batches.to_string()])
        .output()
        .map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or("failed").to_owned());
    }
    let text = std::fs::read_to_string(&file).map_err(|error| error.to_string())?;
    let totals = text.lines().find_map(|line| line.strip_prefix("totals: "));
    totals.and_then(|count| count.trim().parse().ok()).ok_or_else(|| "no totals".to_owned())
}
