//! pages DIRECTORY: writes ringblk's manual pages and shell completions there, as the command line describes itself.

use clap::CommandFactory;
use clap_complete::Shell;
use ringblk::cli::Cli;
use std::path::PathBuf;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let Some(directory) = env::args_os().nth(1).map(PathBuf::from) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "usage: pages DIRECTORY"));
    };
    let (man, completions) = (directory.join("man"), directory.join("completions"));
    fs::create_dir_all(&man)?;
    fs::create_dir_all(&completions)?;
    clap_mangen::generate_to(Cli::command(), man)?;
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        clap_complete::generate_to(shell, &mut Cli::command(), "ringblk", &completions)?;
    }
    Ok(())
}
