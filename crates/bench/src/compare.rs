//! `rudder bench compare`: several results side by side, with ratios to the first.

use crate::args::CompareArgs;
use crate::{html, report, table};

/// Prints a table of the results and, if asked, writes an HTML report of them.
///
/// # Errors
/// If a result cannot be read or the report cannot be written.
pub fn compare(args: &CompareArgs) -> anyhow::Result<()> {
    let reports = args.results.iter().map(|path| report::read(path)).collect::<anyhow::Result<Vec<_>>>()?;
    print!("{}", table::comparison(&reports));
    if let Some(path) = &args.html {
        report::write(path, &html::page(&reports))?;
    }
    Ok(())
}
