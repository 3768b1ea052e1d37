//! WebSocket on `GET /v1/responses`: many responses over one connection, on lanes.
//!
//! Requests of one lane (`stream_id`) run one after the other, lanes run side by side. Responses that are not
//! stored can be gone on from on the connection that made them, and live as long as that. Errors are events;
//! the connection stays open. Where a stream has comments on its progress, a socket has events of a type of our
//! own, without a sequence number, as they are no part of the response.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, Utf8Bytes, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use futures_util::stream::SplitSink;
use futures_util::{SinkExt, StreamExt};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::create::{self, Previous};
use super::events::Event;
use super::live::{Live, Tether};
use super::not_found;
use super::request::{self, ResponseFields};
use super::run::{self, Start};
use super::steer::{Code, Refusal, Steer};
use crate::Server;
use crate::admission::random_id;
use crate::openai::ApiError;
use crate::openai::params::CommonFields;
use crate::progress::{self, Progress};
use crate::session::Caller;

/// Most lanes of a connection that have requests at a time, and requests that wait on one.
const MAX_LANES: usize = 64;
const MAX_QUEUED: usize = 64;
/// Messages on their way out.
const OUTGOING: usize = 256;
/// Of responses that have ended, the most that a connection can go on from: number and bytes.
const MAX_KEPT: usize = 32;
const MAX_KEPT_BYTES: usize = 64 << 20;
/// An idle connection is pinged this often, so that a dead one is noticed.
const IDLE_PING: Duration = Duration::from_secs(30);

/// Opens a connection.
pub(crate) async fn connect(
    State(server): State<Arc<Server>>,
    caller: Caller,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let upgrade = upgrade.map_err(|rejection| {
        ApiError::invalid(format!(
            "GET /v1/responses opens a WebSocket; POST creates a response. {rejection}."
        ))
    })?;
    let limit = server.config.max_body_bytes;
    Ok(upgrade
        .max_message_size(limit)
        .max_frame_size(limit)
        .on_upgrade(move |socket| serve(server, caller, socket)))
}

/// What all tasks of a connection share.
struct Connection {
    server: Arc<Server>,
    caller: Caller,
    /// Names its lanes' sessions.
    id: String,
    out: mpsc::Sender<Message>,
    kept: Mutex<Kept>,
    /// Responses that run.
    running: AtomicUsize,
    /// Bytes of the requests that wait on its lanes: at most what one request may have, for a body that
    /// was read takes many times its bytes.
    waiting: AtomicUsize,
}

/// Responses made on a connection, oldest first.
#[derive(Default)]
struct Kept {
    lives: VecDeque<Arc<Live>>,
}

/// A `response.create` on its way to its lane.
struct Job {
    fields: ResponseFields,
    common: CommonFields,
    /// Its deadline counts from here.
    arrived: Instant,
    /// Bytes that it came in.
    bytes: usize,
}

/// What is read of every message first.
#[derive(Deserialize)]
struct Head {
    r#type: String,
    stream_id: Option<String>,
    response_id: Option<String>,
    mode: Option<String>,
}

type Lanes = HashMap<Option<String>, Lane>;

/// Where requests of one `stream_id` wait. Dropped, it ends once they are done.
struct Lane {
    jobs: mpsc::Sender<Job>,
    /// Those that wait or run.
    unfinished: Arc<AtomicUsize>,
}

async fn serve(server: Arc<Server>, caller: Caller, socket: WebSocket) {
    let (sink, mut incoming) = socket.split();
    let (out, outgoing) = mpsc::channel(OUTGOING);
    let connection = Arc::new(Connection {
        server,
        caller,
        id: random_id("socket_"),
        out,
        kept: Mutex::default(),
        running: AtomicUsize::new(0),
        waiting: AtomicUsize::new(0),
    });
    // Dropped with the connection, they end, and so does what runs on them.
    let mut tasks = JoinSet::new();
    tasks.spawn(write(connection.clone(), sink, outgoing));
    let mut lanes = Lanes::new();
    while let Some(Ok(message)) = incoming.next().await {
        let bytes = match message {
            Message::Text(text) => Bytes::from(text),
            Message::Binary(bytes) => bytes,
            Message::Close(_) => break,
            Message::Ping(_) | Message::Pong(_) => continue,
        };
        connection.hear(&bytes, &mut lanes, &mut tasks).await;
    }
}

/// Sends what comes, and pings where nothing does.
async fn write(
    connection: Arc<Connection>,
    mut sink: SplitSink<WebSocket, Message>,
    mut outgoing: mpsc::Receiver<Message>,
) {
    let mut batch = Vec::new();
    let mut silent = Duration::ZERO;
    let keep_alive = connection.server.config.keep_alive;
    loop {
        match timeout(keep_alive, outgoing.recv_many(&mut batch, OUTGOING)).await {
            Ok(0) => return,
            Ok(_) => silent = Duration::ZERO,
            Err(_) => {
                silent += keep_alive;
                if silent < IDLE_PING && connection.running.load(Ordering::Relaxed) == 0 {
                    continue;
                }
                silent = Duration::ZERO;
                batch.push(Message::Ping(Bytes::new()));
            }
        }
        for message in batch.drain(..) {
            if sink.feed(message).await.is_err() {
                return;
            }
        }
        if sink.flush().await.is_err() {
            return;
        }
    }
}

/// Runs the requests of a lane, one after the other.
async fn run_lane(connection: Arc<Connection>, mut jobs: mpsc::Receiver<Job>, unfinished: Arc<AtomicUsize>) {
    while let Some(job) = jobs.recv().await {
        connection.waiting.fetch_sub(job.bytes, Ordering::Relaxed);
        let stream_id = job.fields.stream_id.clone();
        let previous = job.fields.previous_response_id.clone();
        match connection.create(job).await {
            Ok(live) => connection.follow(live, previous.as_deref()).await,
            Err(error) => {
                if let Some(id) = previous {
                    connection.evict(&id);
                }
                connection.send_error(&error, stream_id.as_deref()).await;
            }
        }
        unfinished.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Connection {
    async fn hear(self: &Arc<Self>, bytes: &[u8], lanes: &mut Lanes, tasks: &mut JoinSet<()>) {
        let head: Head = match crate::body::parse(bytes) {
            Ok(head) => head,
            Err(error) => return self.send_error(&error, None).await,
        };
        let stream_id = head.stream_id.as_deref();
        let result = match head.r#type.as_str() {
            "response.create" => self.queue(bytes, lanes, tasks),
            "response.steer" => return self.steer(bytes).await,
            "response.interrupt" => self.interrupt(&head),
            "response.cancel" => self.cancel(&head),
            other => Err(ApiError::param(
                "type",
                format!(
                    "Unknown event type `{other}`; send response.create, response.steer, \
                     response.interrupt or response.cancel."
                ),
            )),
        };
        if let Err(error) = result {
            self.send_error(&error, stream_id).await;
        }
    }

    fn queue(
        self: &Arc<Self>,
        bytes: &[u8],
        lanes: &mut Lanes,
        tasks: &mut JoinSet<()>,
    ) -> Result<(), ApiError> {
        let (fields, common) = request::parse(bytes)?;
        if fields.background == Some(true) {
            return Err(ApiError::param("background", "background is not supported over WebSocket."));
        }
        let (waiting, most) = (self.waiting.load(Ordering::Relaxed), self.server.config.max_body_bytes);
        if waiting + bytes.len() > most {
            return Err(ApiError::invalid(format!(
                "Requests of {waiting} bytes wait on this connection already, and with this one there would be more \
                 than {most}; send it when some of them have begun."
            )));
        }
        let lane = self.lane(fields.stream_id.clone(), lanes, tasks)?;
        let job = Job { fields, common, arrived: Instant::now(), bytes: bytes.len() };
        // Before the lane can take them back.
        self.waiting.fetch_add(job.bytes, Ordering::Relaxed);
        lane.unfinished.fetch_add(1, Ordering::Relaxed);
        lane.jobs.try_send(job).map_err(|refused| {
            self.waiting.fetch_sub(refused.into_inner().bytes, Ordering::Relaxed);
            lane.unfinished.fetch_sub(1, Ordering::Relaxed);
            ApiError::param("stream_id", format!("{MAX_QUEUED} requests wait on this lane already."))
        })
    }

    /// The lane of this name. Where there are too many, those that have nothing to do go.
    fn lane<'l>(
        self: &Arc<Self>,
        name: Option<String>,
        lanes: &'l mut Lanes,
        tasks: &mut JoinSet<()>,
    ) -> Result<&'l Lane, ApiError> {
        if lanes.len() >= MAX_LANES && !lanes.contains_key(&name) {
            lanes.retain(|_, lane| lane.unfinished.load(Ordering::Relaxed) > 0);
            // Of those that ended.
            while tasks.try_join_next().is_some() {}
        }
        let known = lanes.len();
        match lanes.entry(name) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) if known < MAX_LANES => {
                let (jobs, waiting) = mpsc::channel(MAX_QUEUED);
                let unfinished = Arc::new(AtomicUsize::new(0));
                tasks.spawn(run_lane(self.clone(), waiting, unfinished.clone()));
                Ok(entry.insert(Lane { jobs, unfinished }))
            }
            Entry::Vacant(_) => {
                let message = format!(
                    "{MAX_LANES} lanes of this connection have requests; wait until those of one have ended."
                );
                Err(ApiError::param("stream_id", message))
            }
        }
    }

    /// Starts the response of a request.
    async fn create(&self, job: Job) -> Result<Arc<Live>, ApiError> {
        let Job { mut fields, common, arrived, .. } = job;
        // While it waited for its lane nobody worked on it.
        let taken = Instant::now();
        let settings = fields.settings(&common, &self.server)?;
        let previous = match fields.previous_response_id.as_deref() {
            Some(id) => self.previous(id).await?,
            None => self.server.responses.context(self.caller.owner, None, settings.conversation()).await?,
        };
        let caller = self.caller.on_lane(&self.id, fields.stream_id.as_deref(), arrived);
        let created = create::assemble(&self.server, &caller, fields, settings, previous, taken)?;
        let how = Start { id: None, streams: true, taken: created.taken };
        run::start(&self.server, created.ask, how).await
    }

    async fn previous(&self, id: &str) -> Result<Previous, ApiError> {
        match self.find(id) {
            Some(live) => {
                let link = live.link().ok_or_else(|| not_found(id))?;
                Ok(Previous { link: Some(link), live: Some(live) })
            }
            None => self.server.responses.previous(self.caller.owner, id).await,
        }
    }

    /// Sends a response's events, and those of the successors that follow by themselves.
    async fn follow(&self, live: Arc<Live>, previous: Option<&str>) {
        let reader = live.read_from(0);
        let mut next = Some((live, reader));
        let mut previous = previous.map(str::to_owned);
        while let Some((live, mut reader)) = next {
            self.running.fetch_add(1, Ordering::Relaxed);
            let tether = Tether::with_successors(live.clone());
            self.keep(live.clone());
            let mut events = Vec::new();
            let mut told = None;
            let mut sent = 0;
            loop {
                match timeout(progress::INTERVAL, reader.read(&mut events)).await {
                    Ok(true) => {
                        sent += events.len();
                        self.send_all(&mut events).await;
                        live.mark_sent(sent);
                    }
                    Ok(false) => break,
                    Err(_) => self.tell_progress(&live, &mut told).await,
                }
            }
            tether.let_go();
            self.running.fetch_sub(1, Ordering::Relaxed);
            if !live.is_kept() {
                live.write(|state| state.recorder.forget_events());
            }
            if live.link().is_none()
                && let Some(id) = previous
            {
                self.evict(&id);
            }
            // While it still reads this one, so that the two are never without a reader.
            next = live.successor().map(|successor| (successor.clone(), successor.read_from(0)));
            previous = Some(live.id.clone());
        }
    }

    /// Tells how far a response has come that says nothing yet, if that is new.
    async fn tell_progress(&self, live: &Live, told: &mut Option<Progress>) {
        let progress = live.state().progress;
        if let Some(news) = progress.filter(|_| progress != *told) {
            *told = progress;
            self.send_json(&progress::event(news, &live.id, live.ask.stream_id.as_deref())).await;
        }
    }

    /// Queues a correction. A refusal is told here alone: among the response's events, any number of them would
    /// be kept with it.
    async fn steer(&self, bytes: &[u8]) {
        let event: Value = match crate::body::parse(bytes) {
            Ok(event) => event,
            Err(error) => return self.send_error(&error, None).await,
        };
        let (refusal, live) = match Steer::read(&event) {
            Ok(steer) => match self.find(&steer.previous_response_id) {
                Some(live) => match live.steer(steer) {
                    Ok(_) => return,
                    Err(refusal) => (refusal, Some(live)),
                },
                None => {
                    let message = "The response is not available on this connection.";
                    (steer.refuse(Code::ResponseNotFound, message), None)
                }
            },
            Err(refusal) => {
                let live = self.find(&refusal.previous_response_id);
                (refusal, live)
            }
        };
        self.refuse(&refusal, live.as_deref()).await;
    }

    /// Says why a correction was not taken, behind the response's events that there are by now.
    async fn refuse(&self, refusal: &Refusal, live: Option<&Live>) {
        let mut event = refusal.fields();
        event["type"] = "response.steer.failed".into();
        let mut number = 0;
        if let Some(live) = live {
            number = live.sent().await;
            if let Some(stream_id) = &live.ask.stream_id {
                event["stream_id"] = stream_id.as_str().into();
            }
        }
        event["sequence_number"] = number.into();
        self.send_json(&event).await;
    }

    fn interrupt(&self, head: &Head) -> Result<(), ApiError> {
        if head.mode.as_deref().is_some_and(|mode| mode != "discard_partial_items") {
            return Err(ApiError::param("mode", "mode must be discard_partial_items."));
        }
        // One that has ended by itself meanwhile has told so.
        self.named(head)?.interrupt();
        Ok(())
    }

    fn cancel(&self, head: &Head) -> Result<(), ApiError> {
        self.named(head)?.cancel();
        Ok(())
    }

    fn named(&self, head: &Head) -> Result<Arc<Live>, ApiError> {
        let Some(id) = head.response_id.as_deref() else {
            return Err(ApiError::param("response_id", "response_id must name a response."));
        };
        self.find(id).ok_or_else(|| {
            let message = format!("There is no response `{id}` on this connection.");
            ApiError { code: Some("response_not_found"), ..ApiError::param("response_id", message) }
        })
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, id: &str) -> Option<Arc<Live>> {
        self.kept().lives.iter().rev().find(|live| live.id == id).cloned()
    }

    /// Keeps a response to go on from; the oldest that have ended go.
    fn keep(&self, live: Arc<Live>) {
        let mut kept = self.kept();
        kept.lives.push_back(live);
        let weight = |live: &Arc<Live>| live.weight() + live.link().map_or(0, |link| link.bytes);
        let mut bytes: usize = kept.lives.iter().map(weight).sum();
        while kept.lives.len() > MAX_KEPT || bytes > MAX_KEPT_BYTES {
            let ended = |live: &Arc<Live>| live.state().recorder.response().status.is_final();
            let Some(at) = kept.lives.iter().position(ended) else { break };
            bytes -= kept.lives.remove(at).as_ref().map_or(0, weight);
        }
    }

    /// Forgets a response that a request failed to go on from. A stored one can still be had. One that runs stays, to
    /// be steered and cancelled, and one with corrections that wait, so that its client may try again.
    fn evict(&self, id: &str) {
        let stays = |live: &Live| {
            let state = live.state();
            !state.steers.is_empty() || !state.recorder.response().status.is_final()
        };
        self.kept().lives.retain(|live| live.id != id || stays(live));
    }

    async fn send_all(&self, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            self.send(event).await;
        }
    }

    async fn send(&self, event: Event) {
        // Our events are JSON, thus UTF-8.
        let Ok(text) = Utf8Bytes::try_from(event.json) else { return };
        self.put(Message::Text(text)).await;
    }

    async fn send_json(&self, event: &Value) {
        self.put(Message::Text(event.to_string().into())).await;
    }

    async fn send_error(&self, error: &ApiError, stream_id: Option<&str>) {
        let mut event = json!({"type": "error", "status": error.status.as_u16()});
        match serde_json::to_value(error.body()) {
            Ok(mut body) => event["error"] = body["error"].take(),
            Err(error) => tracing::error!(%error, "an error could not be serialised"),
        }
        // Here the published schema wants a string, where over HTTP null may stand.
        if event["error"]["code"].is_null() {
            event["error"]["code"] = error.kind.into();
        }
        if let Some(stream_id) = stream_id {
            event["stream_id"] = stream_id.into();
        }
        self.send_json(&event).await;
    }

    async fn put(&self, message: Message) {
        // The writer is gone only with the connection.
        let _ = self.out.send(message).await;
    }
}
