//! What our own code costs for one request: time, and instructions where valgrind is there to count them.
//!
//! `cargo bench --bench micro -- [--strict] [NAME]`: only cases whose name has NAME in it. With --strict it fails when
//! a bar is missed.

#[path = "../../tests/common/prepared.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod prepared;

mod cases;
mod count;
mod echo;
mod time;

use cases::{CASES, Case};
use std::process::ExitCode;

fn main() -> ExitCode {
    // What cargo adds.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let [count::FLAG, name, batches] = arguments[..] {
        return count::work(name, batches);
    }
    let strict = arguments.contains(&"--strict");
    let wanted = arguments.iter().find(|argument| !argument.starts_with('-')).copied().unwrap_or("");
    let chosen: Vec<&Case> = CASES.iter().filter(|case| case.name.contains(wanted)).collect();

    let counter = count::available();
    if let Err(why) = &counter {
        println!("Instructions are not counted: {why}.");
    }
    println!("{:<34}{:>10}{:>10}{:>10}{:>8}", "for one request", "min ns", "median ns", "instr.", "bar ns");
    let mut missed = false;
    for case in chosen {
        let time = time::measure(case);
        let instructions = match &counter {
            Ok(()) if !case.worker => {
                count::measure(case).map_or_else(|why| why, |count| format!("{count:.1}"))
            }
            _ => "-".into(),
        };
        let bar = case.bar.map_or(String::new(), |bar| {
            let met = time.median <= bar;
            missed |= !met;
            format!("{bar:.0} {}", if met { "met" } else { "missed" })
        });
        println!("{:<34}{:>10.1}{:>10.1}{instructions:>10}  {bar}", case.name, time.min, time.median);
    }
    if strict && missed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
