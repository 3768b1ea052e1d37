//! The `rudder` command.

fn main() {}
