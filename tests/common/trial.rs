//! Tests that need something of the machine: where it is missing they are reported as ignored, never as passed.

use libtest_mimic::{Arguments, Failed, Trial};
use std::process::{Command, ExitCode, Stdio};

/// A test of what is `needed`; where that is missing, one that is reported as ignored, with the reason on standard error.
pub fn trial<T: Send + 'static>(
    name: &str,
    needed: Result<T, String>,
    run: impl FnOnce(T) + Send + 'static,
) -> Trial {
    match needed {
        Ok(needed) => Trial::test(name, move || {
            run(needed);
            Ok(())
        }),
        Err(reason) => {
            eprintln!("SKIP {name}: {reason}");
            let failed = move || Err(Failed::from(format!("cannot be run here: {reason}")));
            Trial::test(name, failed).with_ignored_flag(true)
        }
    }
}

/// Runs them, as the command line asks for.
pub fn run_trials(trials: Vec<Trial>) -> ExitCode {
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Whether a program can be run.
pub fn installed(program: &str) -> Result<(), String> {
    let found = Command::new(program).arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).status();
    match found {
        Ok(status) if status.success() => Ok(()),
        other => Err(format!("{program} cannot be run: {other:?}")),
    }
}
