//! What tests with a hub on loopback have in common.

use std::io::{BufRead, BufReader};
use std::net::TcpStream;

use rudder_hub::{HubError, Sha256Writer};

/// A request's lines up to the empty one.
pub fn head(stream: &TcpStream) -> Vec<String> {
    BufReader::new(stream).lines().map_while(Result::ok).take_while(|l| !l.is_empty()).collect()
}

pub fn sha256(data: &[u8]) -> String {
    // The writer under test names the hash that it found.
    let dir = tempfile::tempdir().unwrap();
    let mut w = Sha256Writer::create(&dir.path().join("f")).unwrap();
    w.write(data).unwrap();
    match w.finish(data.len() as u64, Some("")) {
        Err(HubError::Corrupt { found, .. }) => found,
        other => panic!("{other:?}"),
    }
}
