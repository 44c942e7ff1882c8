//! The service around the workers: configuration, control API, status.

#![forbid(unsafe_code)]

pub mod client;
pub mod config;
pub mod control;
mod exports;
pub mod features;
pub mod metrics;
pub mod monitor;
pub mod namespace;
pub mod orphans;
pub mod preflight;
mod run;
pub mod sandbox;
pub mod served_vring;
mod socket;
pub mod stats;
pub mod status;

pub use run::{Error, run};
