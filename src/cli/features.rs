//! `ringblk features`.

#![forbid(unsafe_code)]

use super::{Failure, output};
use crate::service::features;

/// Tell what this kernel and this build offer, and what is missing and why.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let features = features::report();
    match args.json {
        true => output::print_json(&features),
        false => output::print(&features.to_string()),
    }
}
