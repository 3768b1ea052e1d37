//! From a listening socket to the end of the last request.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::{Listener, ListenerExt};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

use crate::{Server, router};

/// After the last answer is generated, how long its client may take to read it.
const FLUSH: Duration = Duration::from_secs(3);
/// A connection on which nothing comes for so long is probed, and again at these intervals: a laptop that fell asleep
/// closes none.
const PROBE_AFTER: Duration = Duration::from_secs(60);
const PROBE_INTERVAL: Duration = Duration::from_secs(15);

/// Serves until `shutdown` is done, then drains: new requests get 503, `/ready` too, and what
/// runs may go on for the configured grace. Returns whether all of it ended by itself.
///
/// # Errors
/// If the listener fails.
pub async fn serve(
    listener: TcpListener,
    server: Arc<Server>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<bool> {
    let (close, closed) = oneshot::channel::<()>();
    let serving = axum::serve(tuned(listener), router(server.clone())).with_graceful_shutdown(async {
        // A dropped sender means the end just the same.
        let _ = closed.await;
    });
    let mut serving = tokio::spawn(serving.into_future());
    tokio::select! {
        result = &mut serving => return result.map_err(io::Error::other)?.map(|()| true),
        () = shutdown => {}
    }
    server.drain();
    tracing::info!(grace_s = server.config.grace.as_secs(), "draining: no new requests");
    let all_ended = server.generator.engine().shutdown(server.config.grace).await;
    server.responses.settle().await;
    // The receiver is gone only if serving ended already.
    let _ = close.send(());
    match tokio::time::timeout(FLUSH, &mut serving).await {
        Ok(result) => result.map_err(io::Error::other)??,
        Err(_) => serving.abort(),
    }
    Ok(all_ended)
}

/// The listener, its connections set up.
fn tuned(listener: TcpListener) -> impl Listener<Io = TcpStream, Addr = SocketAddr> {
    listener.tap_io(|stream| {
        // Tokens are small writes that must not wait for one another.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY could not be set");
        }
        let probes = TcpKeepalive::new().with_time(PROBE_AFTER).with_interval(PROBE_INTERVAL);
        if let Err(error) = SockRef::from(&*stream).set_tcp_keepalive(&probes) {
            tracing::debug!(%error, "SO_KEEPALIVE could not be set");
        }
    })
}

/// Done when the process is told to end: Ctrl-C, or SIGTERM.
pub async fn terminated() {
    let interrupt = async {
        if let Err(error) = tokio::signal::ctrl_c().await {
            tracing::warn!(%error, "Ctrl-C cannot be listened for");
            std::future::pending::<()>().await;
        }
    };
    #[cfg(unix)]
    let terminate = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            Err(error) => {
                tracing::warn!(%error, "SIGTERM cannot be listened for");
                std::future::pending::<()>().await;
            }
        }
    };
    #[cfg(not(unix))]
    let terminate = std::future::pending::<()>();
    tokio::select! {
        () = interrupt => {}
        () = terminate => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn connections_are_probed_and_do_not_delay_writes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = tuned(listener).accept().await;
        assert!(SockRef::from(&stream).keepalive().unwrap());
        assert!(stream.nodelay().unwrap());
        drop(client);
    }
}
