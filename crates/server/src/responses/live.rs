//! A response while it runs: its events so far, those who read them, and what is wanted of it.
//!
//! The task in `run.rs` writes; any number of [`Reader`]s follow from any sequence number: the stream of
//! the POST, a GET with `starting_after`, a WebSocket. Whoever holds a [`Tether`] ends the response by
//! letting go of it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::{Notify, watch};

use super::events::{Event, Recorder};
use super::request::Ask;
use super::steer::{Accepted, Queue, Refusal, Steer, Taken};
use super::types::{Link, Record, Response};
use crate::admission::Owner;
use crate::progress::Progress;

/// Of ended responses that may still be asked for, the most kept in memory: number and bytes.
const MAX_ENDED: usize = 1024;
const MAX_ENDED_BYTES: usize = 64 << 20;

/// A response that runs, or has run lately.
pub(crate) struct Live {
    /// Its id.
    pub id: String,
    /// What it was asked.
    pub ask: Arc<Ask>,
    ask_weight: usize,
    state: Mutex<State>,
    news: watch::Sender<()>,
    /// How many of its events the connection that made it has sent.
    sent: watch::Sender<usize>,
    wake: Notify,
}

/// What changes while a response runs.
pub(crate) struct State {
    /// Its events and the response they make.
    pub recorder: Recorder,
    /// Set by those who want it ended; the task looks.
    pub wish: Option<Wish>,
    /// How far it has come, while it says nothing.
    pub progress: Option<Progress>,
    /// User messages that are to steer it.
    pub steers: Queue,
    /// Corrections of the response before it that are part of its input, until its end.
    pub taken: Option<Taken>,
    /// The response that goes on from it by itself.
    pub successor: Option<Arc<Live>>,
    /// What it adds to the conversation; set at its end.
    pub link: Option<Arc<Link>>,
    /// Nothing more will be written.
    closed: bool,
}

/// How a response is to be ended from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    /// For good.
    Cancel,
    /// Its unfinished items are dropped; the conversation goes on from it.
    Interrupt,
}

impl Live {
    /// A response of which nothing is written yet.
    pub fn new(ask: Arc<Ask>, recorder: Recorder) -> Arc<Self> {
        let id = recorder.response().id.clone();
        let state = State {
            recorder,
            wish: None,
            progress: None,
            steers: Queue::default(),
            taken: None,
            successor: None,
            link: None,
            closed: false,
        };
        Arc::new(Self {
            id,
            ask_weight: ask.weight(),
            ask,
            state: Mutex::new(state),
            news: watch::Sender::new(()),
            sent: watch::Sender::new(0),
            wake: Notify::new(),
        })
    }

    /// Looks at the state.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and tells the readers.
    pub fn write<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state());
        self.news.send_replace(());
        result
    }

    /// Changes what is wanted of it and wakes its task.
    pub fn want<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = self.write(change);
        self.wake.notify_one();
        result
    }

    /// Waits until something is wanted of it. May return without reason.
    pub async fn wanted(&self) {
        self.wake.notified().await;
    }

    /// The response as it stands.
    pub fn response(&self) -> Response {
        self.state().recorder.response().clone()
    }

    /// What of it outlives its run.
    pub fn record(&self) -> Result<Record, serde_json::Error> {
        let response = serde_json::to_value(self.state().recorder.response())?;
        Ok(Record { response, input: self.ask.input.to_vec() })
    }

    /// What it adds to the conversation, once it has ended.
    pub fn link(&self) -> Option<Arc<Link>> {
        self.state().link.clone()
    }

    /// The response that goes on from it by itself; final once the readers have come to the end.
    pub fn successor(&self) -> Option<Arc<Self>> {
        self.state().successor.clone()
    }

    /// Queues a user's correction; the task applies it at the next safe boundary.
    ///
    /// # Errors
    /// Why the response cannot be steered, or not so.
    pub fn steer(&self, steer: Steer) -> Result<Accepted, Box<Refusal>> {
        self.want(|state| state.accept(&self.ask, steer))
    }

    /// Ends it for good, if it still runs.
    pub fn cancel(&self) {
        self.want(|state| {
            if !state.recorder.response().status.is_final() {
                state.wish = Some(Wish::Cancel);
            }
        });
    }

    /// Ends it for good, and whatever goes on from it by itself.
    pub fn abandon(&self) {
        let end = |live: &Self| {
            live.want(|state| {
                state.wish = Some(Wish::Cancel);
                state.successor.clone()
            })
        };
        let mut next = end(self);
        while let Some(live) = next {
            next = end(&live);
        }
    }

    /// Ends it and drops its unfinished items. Returns false if it has ended already.
    pub fn interrupt(&self) -> bool {
        self.want(|state| {
            let running = !state.recorder.response().status.is_final();
            if running {
                state.wish.get_or_insert(Wish::Interrupt);
            }
            running
        })
    }

    /// Nothing more will be written.
    pub fn close(&self) {
        self.write(|state| state.closed = true);
    }

    /// Waits until nothing more will be written.
    pub async fn ended(&self) {
        let mut news = self.news.subscribe();
        loop {
            news.borrow_and_update();
            // The sender lives as long as the response.
            if self.state().closed || news.changed().await.is_err() {
                return;
            }
        }
    }

    /// The connection that made it has sent so many of its events.
    pub fn mark_sent(&self, count: usize) {
        self.sent.send_replace(count);
    }

    /// Waits until that connection has sent the events that there are by now; returns how many.
    pub async fn sent(&self) -> usize {
        let count = self.state().recorder.count();
        // The sender lives as long as the response.
        let _ = self.sent.subscribe().wait_for(|&sent| sent >= count).await;
        count
    }

    /// Whether it may be asked for after its end: it is stored, or was steered by way of HTTP maybe.
    pub fn is_kept(&self) -> bool {
        let steered = self.ask.steered || self.state().steers.successor_id.is_some();
        steered || self.ask.settings.echo.store
    }

    /// Follows its events from this sequence number on.
    pub fn read_from(self: &Arc<Self>, sequence: usize) -> Reader {
        Reader { live: self.clone(), next: sequence, news: self.news.subscribe() }
    }

    /// Whether anybody reads its events or waits for its end.
    pub fn is_followed(&self) -> bool {
        self.news.receiver_count() > 0
    }

    /// About the bytes that it takes besides its conversation: what it was asked, and its events.
    pub fn weight(&self) -> usize {
        let events = self.state().recorder.events_from(0).iter().map(|event| event.json.len()).sum::<usize>();
        self.ask_weight + events
    }

    /// About the bytes of the conversation that it holds.
    fn conversation_weight(&self) -> usize {
        self.link().as_ref().or(self.ask.previous.as_ref()).map_or(0, |link| link.chain_bytes)
    }
}

/// Follows a response's events.
pub(crate) struct Reader {
    live: Arc<Live>,
    next: usize,
    news: watch::Receiver<()>,
}

impl Reader {
    /// How far the response has come, while it says nothing.
    pub fn progress(&self) -> Option<Progress> {
        self.live.state().progress
    }

    /// Waits for events and appends all that are there. Returns false when the response is closed and
    /// all was read. Cancel-safe.
    pub async fn read(&mut self, out: &mut Vec<Event>) -> bool {
        loop {
            self.news.borrow_and_update();
            let closed = {
                let state = self.live.state();
                out.extend_from_slice(state.recorder.events_from(self.next));
                self.next = self.next.max(state.recorder.count());
                state.closed
            };
            if !out.is_empty() {
                return true;
            }
            // The sender lives as long as the response, which this reader holds.
            if closed || self.news.changed().await.is_err() {
                return false;
            }
        }
    }
}

/// Cancels a response when dropped, unless it was let go of.
pub(crate) struct Tether {
    live: Option<Arc<Live>>,
    successors: bool,
}

impl Tether {
    /// Binds the response to whoever holds this.
    pub fn new(live: Arc<Live>) -> Self {
        Self { live: Some(live), successors: false }
    }

    /// Binds the response, and whatever goes on from it by itself.
    pub fn with_successors(live: Arc<Live>) -> Self {
        Self { live: Some(live), successors: true }
    }

    /// Lets it run on by itself.
    pub fn let_go(mut self) {
        self.live = None;
    }
}

impl Drop for Tether {
    fn drop(&mut self) {
        match &self.live {
            Some(live) if self.successors => live.abandon(),
            Some(live) => live.cancel(),
            None => {}
        }
    }
}

/// Responses that run or ended lately, by id.
#[derive(Default)]
pub(crate) struct Registry {
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    lives: HashMap<String, Arc<Live>>,
    /// Ended ones, oldest first.
    ended: VecDeque<Ended>,
    bytes: usize,
}

/// What an ended response takes, in bytes.
struct Ended {
    id: String,
    own: usize,
    /// Its conversation; 0 once a response that goes on from it counts that as part of its own.
    conversation: usize,
    /// The response that it goes on from.
    previous: Option<String>,
}

impl Known {
    /// Lets go of the oldest ended ones until what is left is no more than may be kept.
    fn trim(&mut self) {
        while self.ended.len() > MAX_ENDED || self.bytes > MAX_ENDED_BYTES {
            let Some(oldest) = self.ended.pop_front() else { break };
            self.bytes -= oldest.own + oldest.conversation;
            self.lives.remove(&oldest.id);
        }
    }
}

impl Registry {
    /// Finds a response.
    pub fn get(&self, id: &str) -> Option<Arc<Live>> {
        self.known().lives.get(id).cloned()
    }

    /// Finds a response, or waits for the successor that has this id to be.
    pub async fn find(&self, id: &str) -> Option<Arc<Live>> {
        if let Some(live) = self.get(id) {
            return Some(live);
        }
        let expected = |live: &&Arc<Live>| live.state().steers.successor_id.as_deref() == Some(id);
        let parent = self.known().lives.values().find(expected).cloned()?;
        parent.ended().await;
        self.get(id)
    }

    /// Makes a response known while it runs.
    pub fn add(&self, live: Arc<Live>) {
        self.known().lives.insert(live.id.clone(), live);
    }

    /// It has ended. `keep`: it may still be asked for; else it is forgotten at once.
    pub fn ended(&self, live: &Live, keep: bool) {
        let (own, conversation) = (live.weight(), live.conversation_weight());
        let mut known = self.known();
        if !keep {
            known.lives.remove(&live.id);
            return;
        }
        let previous = live.ask.previous_response_id.clone();
        if let Some(previous) = known.ended.iter_mut().find(|ended| Some(&ended.id) == previous.as_ref()) {
            let shared = std::mem::take(&mut previous.conversation);
            known.bytes -= shared;
        }
        known.bytes += own + conversation;
        known.ended.push_back(Ended { id: live.id.clone(), own, conversation, previous });
        known.trim();
    }

    /// Forgets a response, as when it is deleted.
    pub fn forget(&self, id: &str) {
        let known = &mut *self.known();
        known.lives.remove(id);
        let at = known.ended.iter().position(|ended| ended.id == id);
        let Some(gone) = at.and_then(|at| known.ended.remove(at)) else { return };
        known.bytes -= gone.own + gone.conversation;
        // The one that it went on from counts its conversation again.
        let previous = gone.previous.and_then(|previous| known.lives.get(&previous)).cloned();
        if let Some(previous) = previous
            && let Some(ended) = known.ended.iter_mut().find(|ended| ended.id == previous.id)
        {
            known.bytes -= ended.conversation;
            ended.conversation = previous.conversation_weight();
            known.bytes += ended.conversation;
            known.trim();
        }
    }

    /// Finds an item of the owner's that is still kept.
    pub fn item(&self, owner: Owner, id: &str) -> Option<Value> {
        let known = self.known();
        let own = known.lives.values().filter(|live| live.ask.owner == owner);
        let links = own.filter_map(|live| live.link());
        let is_it = |item: &&Value| item.get("id").is_some_and(|known| known == id);
        links.into_iter().find_map(|link| link.input.iter().chain(&link.output).find(is_it).cloned())
    }

    /// Those that have not ended.
    pub fn running(&self) -> Vec<Arc<Live>> {
        let known = self.known();
        let running = |live: &&Arc<Live>| !live.state().recorder.response().status.is_final();
        known.lives.values().filter(running).cloned().collect()
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use serde_json::json;

    use super::*;
    use crate::responses::events::Dressing;
    use crate::responses::request::Settings;
    use crate::responses::steer::Code;
    use crate::responses::types::{Echo, Status};

    const MIB: usize = 1 << 20;

    /// A response to a text of so many bytes, which goes on from `previous`.
    fn live(id: &str, bytes: usize, previous: Option<&Arc<Live>>) -> Arc<Live> {
        let echo = Arc::new(Echo { store: true, ..Echo::default() });
        let response = Response {
            id: id.into(),
            object: "response",
            created_at: 0,
            completed_at: None,
            status: Status::InProgress,
            incomplete_details: None,
            error: None,
            previous_response_id: None,
            output: Vec::new(),
            usage: None,
            rudder: None,
            echo: echo.clone(),
        };
        let ask = Ask {
            settings: Arc::new(Settings::of_test(echo)),
            owner: Owner::default(),
            session: None,
            previous_response_id: previous.map(|live| live.id.clone()),
            previous: previous.and_then(|live| live.link()),
            input: vec![json!("x".repeat(bytes))].into(),
            stream_id: None,
            steered: false,
            arrived: Instant::now(),
            deadline: None,
        };
        let dressing = Dressing { stream_id: None, names: Arc::default(), seal: None };
        Live::new(Arc::new(ask), Recorder::new(response, dressing))
    }

    /// The same, with what it adds to the conversation.
    fn linked(id: &str, bytes: usize, previous: Option<&Arc<Live>>) -> Arc<Live> {
        let live = live(id, bytes, previous);
        let link = Link::new(live.ask.previous.clone(), live.ask.input.clone(), Vec::new(), None);
        live.state().link = Some(Arc::new(link));
        live
    }

    fn end(registry: &Registry, live: &Arc<Live>) {
        registry.add(live.clone());
        registry.ended(live, true);
    }

    fn kept(registry: &Registry, ids: &[&str]) -> Vec<bool> {
        ids.iter().map(|id| registry.get(id).is_some()).collect()
    }

    #[test]
    fn long_inputs_push_older_responses_out() {
        let registry = Registry::default();
        for id in ["a", "b", "c", "d"] {
            end(&registry, &live(id, 20 * MIB, None));
        }
        assert_eq!(kept(&registry, &["a", "b", "c", "d"]), [false, true, true, true]);
        for id in ["b", "c", "d"] {
            registry.forget(id);
        }
        assert_eq!(registry.known().bytes, 0);
    }

    #[test]
    fn a_conversation_counts_with_its_last_response() {
        let registry = Registry::default();
        let mut last = linked("a", 10 * MIB, None);
        end(&registry, &last);
        for id in ["b", "c", "d", "e"] {
            last = linked(id, 1, Some(&last));
            end(&registry, &last);
        }
        assert_eq!(kept(&registry, &["a", "b", "c", "d", "e"]), [true; 5]);
        // A failed one holds what it was to go on from.
        registry.forget("a");
        end(&registry, &live("f", 30 * MIB, Some(&last)));
        assert_eq!(kept(&registry, &["b", "c", "d", "e", "f"]), [true; 5]);
        end(&registry, &live("g", 5 * MIB, None));
        assert_eq!(kept(&registry, &["b", "e", "f", "g"]), [false, false, false, true]);
    }

    #[test]
    fn a_conversation_counts_although_its_last_response_was_deleted() {
        let registry = Registry::default();
        for id in ["a", "b", "c", "d"] {
            let first = linked(id, 20 * MIB, None);
            end(&registry, &first);
            let second = format!("{id}2");
            end(&registry, &linked(&second, 1, Some(&first)));
            registry.forget(&second);
        }
        assert!(kept(&registry, &["a", "b", "c", "d"]).contains(&false));
        assert!(registry.known().bytes <= MAX_ENDED_BYTES);
    }

    #[test]
    fn corrections_that_were_put_back_count_again() {
        let live = live("a", 1, None);
        let steer = || {
            let input = "x".repeat(600 << 10);
            Steer::read(&json!({"previous_response_id": "a", "input": input})).unwrap()
        };
        live.steer(steer()).unwrap();
        live.write(|state| {
            let steers = state.steers.take();
            state.steers.put_back(steers);
        });
        assert_eq!(live.steer(steer()).unwrap_err().code, Code::TooManyPendingSteers);
    }
}
