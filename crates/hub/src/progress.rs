//! Progress of a long operation: a bar on a terminal, a line every few seconds elsewhere.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a log line is written where no bar can be drawn.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// Reports bytes done of bytes expected on standard error.
pub struct Progress {
    bar: ProgressBar,
    label: String,
    total: u64,
    logged: Instant,
}

impl Progress {
    /// Starts at zero of `total` bytes.
    pub fn new(label: impl Into<String>, total: u64) -> Self {
        let label = label.into();
        let bar = ProgressBar::new(total);
        let style = "{msg} [{bar:32}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        bar.set_style(
            ProgressStyle::with_template(style)
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("=> "),
        );
        bar.set_message(label.clone());
        Self { bar, label, total, logged: Instant::now() }
    }

    /// `done` bytes are done in all.
    pub fn set(&mut self, done: u64) {
        self.bar.set_position(done);
        if self.bar.is_hidden() && self.logged.elapsed() >= LOG_EVERY {
            self.logged = Instant::now();
            eprintln!("{}: {} of {}", self.label, bytes(done), bytes(self.total));
        }
    }

    /// These bytes were there already: they count, but not into the speed.
    pub fn resume_at(&mut self, done: u64) {
        self.bar.set_position(done);
        self.bar.reset_eta();
    }

    /// Writes a line above the bar.
    pub fn say(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A byte count for people: `468.6 MiB`.
pub fn bytes(n: u64) -> String {
    indicatif::BinaryBytes(n).to_string()
}
