//! The `ringblk` command: parse, run, and say what went wrong.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use ringblk::cli::Cli;
use ringblk::ring::ignore_file_size_signal;

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log(cli.log_filter());
    if let Err(error) = ignore_file_size_signal() {
        log::warn!("SIGXFSZ cannot be ignored: {error}");
    }
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("ringblk: error: {failure}");
            failure.exit_code()
        }
    }
}

/// Logs to standard error, by RUST_LOG or else by `filter`.
fn start_log(filter: &str) {
    let mut builder = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(filter));
    // The journal keeps its own time.
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        builder.format_timestamp(None);
    }
    builder.init();
}
