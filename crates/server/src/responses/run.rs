//! A response's task: runs the turn, writes its events, ends it where it is told to, and starts the
//! successor that a correction asks for.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rudder_text::Text;
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::background::Place;
use super::events::{Dressing, Ending, Recorder};
use super::live::{Live, Tether, Wish};
use super::request::{Ask, Prepared, response_id};
use super::steer::{self, Code, Steer, Taken};
use super::types::{Failure, Link, Reason, Response, Status, Usage};
use crate::Server;
use crate::conversation::{KnownMessage, Role, Turn};
use crate::generate::{Delta, EndReason, Running, Totals};
use crate::openai::ApiError;
use crate::openai::logprobs::ChatLogprobs;
use crate::progress;
use crate::unix_now;

/// Room for an answer that truncation leaves, if the request does not limit it.
const ROOM: usize = 1024;

/// How a response is started.
#[derive(Default)]
pub(crate) struct Start {
    /// Its id, if it was given one before.
    pub id: Option<String>,
    /// Its client reads events: a conversation that does not fit is told by them.
    pub streams: bool,
    /// Corrections in its input; they wait again if it comes to nothing.
    pub taken: Option<Taken>,
}

/// Starts a response and its task.
///
/// # Errors
/// What is wrong with the request; a full or ending server. Then there is no response.
pub(crate) async fn start(server: &Arc<Server>, mut ask: Ask, how: Start) -> Result<Arc<Live>, ApiError> {
    let background = ask.settings.echo.background;
    let place = background.then(|| Place::take(server, ask.owner)).transpose()?;
    let id = how.id.unwrap_or_else(response_id);
    if ask.session.is_none() && ask.settings.echo.store {
        ask.session = Some(id.as_str().into());
    }
    let Prepared { turn, names } = ask.prepare(&server.responses.seal)?;
    server.generator.prepared("read", ask.arrived.elapsed());
    let seal = ask.settings.sealed.then(|| server.responses.seal.clone());
    let dressing = Dressing { stream_id: ask.stream_id.clone(), names, seal };
    let response = response(id, &ask);
    let live = Live::new(Arc::new(ask), Recorder::new(response, dressing));
    live.state().taken = how.taken;
    let work = if let Some(place) = place {
        Work::Queued(Box::new(turn), place)
    } else if turn.messages.is_empty() {
        // Only what comes later has words to read.
        Work::Done(Ending::Completed, Some(Usage::from(Totals::default())))
    } else {
        match start_turn(server, turn, &live.ask).await {
            Ok(running) => Work::Running(running),
            Err(error) if how.streams && error.code == Some("context_length_exceeded") => {
                Work::Done(Ending::Failed(failure(&error)), None)
            }
            Err(error) => return Err(error),
        }
    };
    live.write(|state| match &work {
        Work::Queued(..) => state.recorder.queued(),
        _ => state.recorder.begin(),
    });
    // From here on it is ended by its task alone, even if who asked goes away now.
    let tether = Tether::with_successors(live.clone());
    let (told, started) = oneshot::channel();
    tokio::spawn(live_through(server.clone(), live.clone(), work, told));
    // A dropped sender means that it is over already.
    let _ = started.await;
    tether.let_go();
    Ok(live)
}

/// What a response's task begins with.
enum Work {
    /// A turn that runs.
    Running(Running),
    /// A turn that waits for the engine, and its place among those that do.
    Queued(Box<Turn>, Place),
    /// Nothing: it ends so.
    Done(Ending, Option<Usage>),
}

/// A response's task, from its creation to its end.
async fn live_through(server: Arc<Server>, live: Arc<Live>, work: Work, told: oneshot::Sender<()>) {
    server.responses.started(&live).await;
    // Who asked may be gone.
    let _ = told.send(());
    let (ending, usage) = match work {
        Work::Running(running) => return drive(server, live, running).await,
        Work::Done(ending, usage) => (ending, usage),
        Work::Queued(turn, place) => return drive_queued(server, live, *turn, place).await,
    };
    end(&server, &live, ending, usage).await;
    live.close();
}

fn response(id: String, ask: &Ask) -> Response {
    Response {
        id,
        object: "response",
        created_at: unix_now(),
        completed_at: None,
        status: Status::InProgress,
        incomplete_details: None,
        error: None,
        previous_response_id: ask.previous_response_id.clone(),
        output: Vec::new(),
        usage: None,
        rudder: None,
        echo: ask.settings.echo.clone(),
    }
}

fn failure(error: &ApiError) -> Failure {
    Failure { code: error.code.unwrap_or("server_error").into(), message: error.message.clone() }
}

/// Queues the turn; drops the oldest turns of the conversation if it is too long and may be cut.
async fn start_turn(server: &Arc<Server>, turn: Turn, ask: &Ask) -> Result<Running, ApiError> {
    let spare = ask.settings.truncate.then(|| turn.clone());
    match (server.start_turn(turn).await, spare) {
        (Err(error), Some(turn)) if error.code == Some("context_length_exceeded") => {
            let shorter = truncate(server, turn).await?.ok_or(error)?;
            server.start_turn(shorter).await
        }
        (started, _) => started.map_err(|error| match error.param.as_deref() {
            Some("messages" | "prompt") => error.at("input"),
            _ => error,
        }),
    }
}

/// The turn without as many of its oldest exchanges as it takes to fit; `None` if the last alone does not.
async fn truncate(server: &Arc<Server>, turn: Turn) -> Result<Option<Turn>, ApiError> {
    let maximum = server.generator.engine().max_context();
    let room = turn.max_tokens.unwrap_or(ROOM).clamp(1, maximum / 2);
    let begin = turn.messages.iter().take_while(|message| message.role == Role::System).count();
    let is_cut = |(index, message): (usize, &KnownMessage)| {
        (index > begin && message.role == Role::User).then_some(index)
    };
    let cuts: Vec<usize> = turn.messages.iter().enumerate().filter_map(is_cut).collect();
    let without = |cut: usize| {
        let mut shorter = turn.clone();
        shorter.messages.drain(begin..cut);
        shorter
    };
    // The first cut that fits; every later one does too.
    let (mut low, mut high) = (0, cuts.len());
    while low < high {
        let middle = (low + high) / 2;
        match server.count_tokens(without(cuts[middle])).await? + room <= maximum {
            true => high = middle,
            false => low = middle + 1,
        }
    }
    Ok(cuts.get(low).or(cuts.last()).map(|&cut| without(cut)))
}

/// Runs a background response from its place in the queue; while the engine's is full, it stays in ours.
async fn drive_queued(server: Arc<Server>, live: Arc<Live>, turn: Turn, place: Place) {
    let cancelled = || live.state().wish == Some(Wish::Cancel);
    let started = loop {
        match start_turn(&server, turn.clone(), &live.ask).await {
            Err(ApiError { code: Some("rate_limit_exceeded"), retry_after, .. }) if !cancelled() => {
                let pause = Duration::from_secs(retry_after.unwrap_or(1));
                // Woken early, it finds that it is cancelled, or tries once more for nothing.
                let _ = timeout(pause, live.wanted()).await;
            }
            started => break started,
        }
    };
    drop(place);
    let ending = match started {
        Ok(running) => {
            live.write(|state| state.recorder.begin());
            return drive(server, live, running).await;
        }
        Err(_) if cancelled() => Ending::Cancelled,
        Err(error) => Ending::Failed(failure(&error)),
    };
    end(&server, &live, ending, None).await;
    live.close();
}

/// Runs a response to its end, and starts what follows it.
fn drive(
    server: Arc<Server>,
    live: Arc<Live>,
    mut running: Running,
) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    // Boxed, as its successor's task is of the same type.
    Box::pin(async move {
        let ending = follow(&server, &live, &mut running).await;
        let totals = running.totals();
        live.state().recorder.time(totals.into());
        // What still runs is cancelled before anybody hears of the end.
        drop(running);
        let steers = end(&server, &live, ending, Some(totals.into())).await;
        if !steers.is_empty() {
            succeed(&server, &live, steers).await;
        }
        live.close();
    })
}

/// Writes events until the turn ends or is ended.
async fn follow(server: &Server, live: &Live, running: &mut Running) -> Ending {
    loop {
        let (wish, steered) = {
            let state = live.state();
            (state.wish, !state.steers.is_empty())
        };
        match wish {
            Some(Wish::Cancel) => return Ending::Cancelled,
            Some(Wish::Interrupt) => return Ending::Interrupted,
            None if steered => running.stop_outside_calls(),
            None => {}
        }
        let news = tokio::select! {
            biased;
            news = running.advance() => news,
            () = live.wanted() => continue,
            () = sleep(progress::INTERVAL), if running.is_silent() => {
                live.state().progress = running.progress();
                continue;
            }
        };
        let Some(delta) = running.deltas().next().filter(|_| news) else {
            return Ending::Completed;
        };
        write(server, live, delta);
        if let Some(end) = &delta.end {
            if let Some(failed) = end.reason.failure() {
                return Ending::Failed(failure(&failed.into()));
            }
            return match &end.reason {
                EndReason::Length if !live.ask.settings.generate => Ending::Completed,
                EndReason::Length => Ending::Incomplete(Reason::MaxOutputTokens),
                // With calls made, it waits for their results as any other response does.
                EndReason::Stopped if calls_tools(live) => Ending::Completed,
                EndReason::Stopped => Ending::Incomplete(Reason::Steered),
                _ => Ending::Completed,
            };
        }
    }
}

fn calls_tools(live: &Live) -> bool {
    !steer::owed(&live.state().recorder.response().output).is_empty()
}

fn write(server: &Server, live: &Live, delta: &Delta) {
    let text = live.ask.settings.logprobs.then(|| server.generator.text());
    live.write(|state| {
        state.progress = None;
        for (index, piece) in delta.pieces.iter().enumerate() {
            let logprobs = text.map(|text| logprobs(text, delta, index)).unwrap_or_default();
            state.recorder.piece(piece, &logprobs);
        }
    });
}

/// Those of a piece that is text. Those of reasoning, of calls and of markup are not reported.
fn logprobs(text: &Text, delta: &Delta, piece: usize) -> Vec<Value> {
    let tokens = delta.text_tokens.iter().filter(|(index, _)| *index == piece).map(|(_, token)| token);
    ChatLogprobs::new(text, tokens).into_values()
}

/// Ends the response. Returns corrections for a successor to take up.
async fn end(server: &Server, live: &Arc<Live>, ending: Ending, usage: Option<Usage>) -> Vec<Steer> {
    let continues = matches!(ending, Ending::Completed | Ending::Incomplete(_));
    let failed = matches!(ending, Ending::Failed(_));
    // Given back before anybody hears of the end and tries again.
    let taken = live.state().taken.take();
    match ending {
        Ending::Failed(_) | Ending::Cancelled => drop(taken),
        _ => taken.into_iter().for_each(Taken::commit),
    }
    let steers = live.write(|state| {
        if ending == Ending::Completed && live.ask.settings.generate {
            state.recorder.answer_at_least_nothing();
        }
        state.recorder.end(ending, usage);
        let output = state.recorder.response().output.clone();
        let owed = steer::owed(&output);
        if !failed {
            let Ask { previous, input, session, .. } = &*live.ask;
            let link = Link::new(previous.clone(), input.clone(), output, session.clone());
            state.link = Some(Arc::new(link));
        }
        if continues && !owed.is_empty() {
            for steer in state.steers.waiting() {
                state.recorder.note("response.steer.pending", &steer.pending(&owed));
            }
            state.steers.owed = owed;
            return Vec::new();
        }
        let steers = state.steers.take();
        if continues {
            return steers;
        }
        for steer in steers {
            let refusal =
                steer.fail(Code::ResponseNotActive, "The response ended before this could be applied.");
            state.recorder.note("response.steer.failed", &refusal.fields());
        }
        Vec::new()
    });
    server.responses.ended(live).await;
    steers
}

/// Starts the successor that takes up the corrections, or gives them back.
async fn succeed(server: &Arc<Server>, live: &Arc<Live>, steers: Vec<Steer>) {
    let ask = Ask {
        settings: live.ask.settings.clone(),
        owner: live.ask.owner,
        session: live.ask.session.clone(),
        previous_response_id: Some(live.id.clone()),
        previous: live.link(),
        input: steers.iter().flat_map(|steer| steer.items.iter().cloned()).collect(),
        stream_id: live.ask.stream_id.clone(),
        steered: true,
        arrived: Instant::now(),
        deadline: None,
    };
    let id = live.state().steers.successor_id.clone();
    match start(server, ask, Start { id, ..Start::default() }).await {
        Ok(successor) => {
            let cancelled = live.write(|state| {
                state.successor = Some(successor.clone());
                state.wish == Some(Wish::Cancel)
            });
            if cancelled {
                successor.abandon();
            }
        }
        Err(error) => live.write(|state| {
            for steer in steers {
                let refusal = steer.fail(Code::SuccessorCreationFailed, error.message.as_str());
                state.recorder.note("response.steer.failed", &refusal.fields());
            }
        }),
    }
}
