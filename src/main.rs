//! The binary: arguments in, exit code out.

use std::process::ExitCode;

use clap::Parser as _;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    match nudged::commands::run(nudged::commands::Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("nudged: {error:#}");
            nudged::commands::exit_code(&error)
        }
    }
}
