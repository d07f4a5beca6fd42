//! The compute thread, and its interface to request handlers.
//!
//! Generation, embeddings and scores all run here, one forward pass at a time, so that they never compete for cores.
//! When idle, the thread blocks on its channel.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

use super::metrics::Metrics;
use super::places::{Place, Places};
use super::problem::Problem;
use crate::data::record::Message;
use crate::error::{Error, Result};
use crate::generate::engine::{Event, Limits, Request, Schedule, Ticket};
use crate::generate::local::LocalModel;
use crate::ops::cuda::device::still_works;

/// A command to the engine.
pub(super) enum Command {
    Generate(Job),
    /// Embed texts, one vector each.
    Embed(Embed, oneshot::Sender<Result<Vec<Vec<f32>>>>),
    /// Score answers.
    Score(Judged, oneshot::Sender<Result<Vec<f64>>>),
    Cancel(u64),
    /// See [`Schedule::tidy`].
    Tidy,
    /// Wakes an engine that was told to stop.
    Stop,
}

/// One prompt to answer.
pub(super) struct Job {
    id: u64,
    /// The prompt's index in its HTTP request.
    place: usize,
    request: Request,
    /// Whether to report pieces, not only the end.
    stream: bool,
    arrived: Instant,
    events: mpsc::UnboundedSender<(usize, Event)>,
}

/// How the states of a text are pooled into one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Pooling {
    Mean,
    Last,
}

/// Texts to embed.
pub(super) struct Embed {
    pub(super) texts: Vec<Vec<u32>>,
    pub(super) pooling: Pooling,
}

/// Answers to judge.
pub(super) struct Judged {
    pub(super) prompt: Vec<Message>,
    pub(super) tools: Option<serde_json::Value>,
    /// Number of earlier answers in the same request.
    pub(super) first: usize,
    pub(super) answers: Vec<String>,
}

/// Tokens of texts or answers given to the engine at once, and the estimated bytes per token.
const PART_TOKENS: usize = 2048;
const BYTES_A_TOKEN: usize = 3;

/// Splits items into parts of total size at most `most`, or a single larger item. Each item counts as at least 16,
/// since empty ones take time too.
fn parts<T>(items: Vec<T>, most: usize, size: impl Fn(&T) -> usize) -> Vec<Vec<T>> {
    let (mut parts, mut room) = (Vec::<Vec<T>>::new(), 0);
    for item in items {
        let size = size(&item).max(16);
        match parts.last_mut() {
            Some(part) if size <= room => part.push(item),
            _ => {
                room = most.max(size);
                parts.push(vec![item]);
            }
        }
        room -= size;
    }
    parts
}

/// Engine computations other than generation.
pub(super) trait Others {
    /// One unit vector per text.
    fn embed(&self, embed: &Embed) -> Result<Vec<Vec<f32>>>;
    /// One score per answer.
    fn score(&self, judged: &Judged) -> Result<Vec<f64>>;
}

/// The handlers' end of the channel.
pub(super) struct Client {
    commands: Sender<Command>,
    /// Of those who are asked for answers, embeddings or scores.
    pub(super) places: Places,
    next: AtomicU64,
    told_to_stop: Arc<AtomicBool>,
}

impl Client {
    /// Allows at most `most` prompts in progress or waiting.
    pub(super) fn new(commands: Sender<Command>, most: usize) -> Self {
        Self {
            commands,
            places: Places::new(most),
            next: AtomicU64::new(0),
            told_to_stop: Arc::default(),
        }
    }

    /// Set when the engine should stop; for [`Engine::run`].
    pub(super) fn told_to_stop(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.told_to_stop)
    }

    /// Whether nothing is in progress.
    pub(super) fn is_idle(&self) -> bool {
        self.places.are_all_free()
    }

    /// Ends the engine after its current step, regardless of waiting work.
    pub(super) fn stop(&self) {
        self.told_to_stop.store(true, Ordering::Relaxed);
        // An engine that is gone has stopped.
        let _ = self.commands.send(Command::Stop);
    }

    /// Lets what was kept of adapters go that are gone.
    pub(super) fn tidy(&self) {
        // An engine that is gone keeps nothing.
        let _ = self.commands.send(Command::Tidy);
    }

    fn send(&self, command: Command) -> Result<(), Problem> {
        self.commands.send(command).map_err(|_| Problem::stopping())
    }

    /// Requests answers to prompts; fails at once if `place` must cover more prompts than there are free slots.
    ///
    /// # Errors
    /// Too many prompts; a stopped engine.
    pub(super) fn generate(
        &self,
        requests: Vec<Request>,
        stream: bool,
        mut place: Place,
    ) -> Result<Open, Problem> {
        let count = requests.len();
        place.hold(count)?;
        let first = self.next.fetch_add(count as u64, Ordering::Relaxed);
        let (events, receiver) = mpsc::unbounded_channel();
        let open = Open {
            commands: self.commands.clone(),
            events: receiver,
            ids: (first..first + count as u64).map(Some).collect(),
            _place: place,
        };
        for (place, request) in requests.into_iter().enumerate() {
            let (id, events) = (first + place as u64, events.clone());
            let arrived = Instant::now();
            self.send(Command::Generate(Job { id, place, request, stream, arrived, events }))?;
        }
        Ok(open)
    }

    /// See [`Others::embed`]. The engine gets a few texts at a time, so that it continues with answers in between, and
    /// gets no more once the client is gone. The caller holds a place.
    ///
    /// # Errors
    /// A stopped engine, and model errors.
    pub(super) async fn embed(&self, embed: Embed, _: &Place) -> Result<Vec<Vec<f32>>, Problem> {
        let Embed { texts, pooling } = embed;
        let mut all = Vec::with_capacity(texts.len());
        for texts in parts(texts, PART_TOKENS, Vec::len) {
            let embed = Embed { texts, pooling };
            all.extend(self.ask(|answer| Command::Embed(embed, answer)).await?);
        }
        Ok(all)
    }

    /// See [`Others::score`]. The engine gets a few answers at a time, as with [`embed`](Self::embed).
    ///
    /// # Errors
    /// As [`embed`](Self::embed).
    pub(super) async fn score(&self, judged: Judged, _: &Place) -> Result<Vec<f64>, Problem> {
        let Judged { prompt, tools, answers, .. } = judged;
        let mut all = Vec::with_capacity(answers.len());
        for answers in parts(answers, PART_TOKENS, |answer| answer.len() / BYTES_A_TOKEN) {
            let (prompt, tools) = (prompt.clone(), tools.clone());
            let judged = Judged { prompt, tools, first: all.len(), answers };
            all.extend(self.ask(|answer| Command::Score(judged, answer)).await?);
        }
        Ok(all)
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T>>) -> Command,
    ) -> Result<T, Problem> {
        let (sender, receiver) = oneshot::channel();
        self.send(command(sender))?;
        Ok(receiver.await.map_err(|_| Problem::stopping())??)
    }
}

/// Prompts in progress. Dropping it early, as when the client disconnects, cancels the unanswered ones.
pub(super) struct Open {
    commands: Sender<Command>,
    events: mpsc::UnboundedReceiver<(usize, Event)>,
    /// Ids of the unanswered prompts.
    ids: Vec<Option<u64>>,
    _place: Place,
}

impl Open {
    /// The next event with its prompt's index; `None` after the last prompt has ended.
    ///
    /// # Errors
    /// A stopped engine.
    pub(super) async fn next(&mut self) -> Result<Option<(usize, Event)>, Problem> {
        if self.ids.iter().all(Option::is_none) {
            return Ok(None);
        }
        let (place, event) = self.events.recv().await.ok_or_else(Problem::stopping)?;
        if matches!(event, Event::Done(..) | Event::Failed(..)) {
            self.ids[place] = None;
        }
        Ok(Some((place, event)))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        for id in self.ids.iter().copied().flatten() {
            // An engine that is gone has nothing to cancel.
            let _ = self.commands.send(Command::Cancel(id));
        }
    }
}

/// A prompt in the scheduler.
struct Under {
    id: u64,
    place: usize,
    stream: bool,
    arrived: Instant,
    prompt_tokens: usize,
    spoke: bool,
    events: mpsc::UnboundedSender<(usize, Event)>,
}

/// The compute thread's end of the channel.
pub(super) struct Engine<'a> {
    model: &'a LocalModel,
    limits: Limits,
    others: &'a dyn Others,
    metrics: &'a Metrics,
    schedule: Box<dyn Schedule + 'a>,
    open: BTreeMap<Ticket, Under>,
}

impl<'a> Engine<'a> {
    /// An idle engine.
    pub(super) fn new(
        model: &'a LocalModel,
        limits: Limits,
        others: &'a dyn Others,
        metrics: &'a Metrics,
    ) -> Self {
        let schedule = model.scheduler(limits);
        Self { model, limits, others, metrics, schedule, open: BTreeMap::new() }
    }

    /// Runs until told to stop; commands still queued then are dropped. Computes on the calling thread, which should
    /// belong to rayon's pool.
    ///
    /// # Errors
    /// A GPU that has failed permanently. Clients already answered know; waiting ones learn of it when the engine ends.
    pub(super) fn run(
        mut self,
        commands: &Receiver<Command>,
        told_to_stop: &AtomicBool,
    ) -> Result<()> {
        while let Ok(command) = commands.recv() {
            let mut next = Some(command);
            loop {
                while let Some(command) = next.take() {
                    if matches!(command, Command::Stop) || told_to_stop.load(Ordering::Relaxed) {
                        return Ok(());
                    }
                    let computes = matches!(command, Command::Embed(..) | Command::Score(..));
                    self.take(command)?;
                    // One such computation at a time, so that answers continue in between.
                    next = if computes { None } else { commands.try_recv().ok() };
                }
                self.count();
                if self.open.is_empty() {
                    break;
                }
                self.step()?;
                next = commands.try_recv().ok();
            }
        }
        Ok(())
    }

    fn take(&mut self, command: Command) -> Result<()> {
        match command {
            Command::Generate(job) => self.submit(job),
            Command::Embed(embed, answer) if !answer.is_closed() => {
                return self.tell(answer, self.others.embed(&embed));
            }
            Command::Score(judged, answer) if !answer.is_closed() => {
                return self.tell(answer, self.others.score(&judged));
            }
            Command::Cancel(id) => {
                let found = self.open.iter().find(|(_, under)| under.id == id);
                if let Some(ticket) = found.map(|(ticket, _)| *ticket) {
                    self.open.remove(&ticket);
                    self.schedule.cancel(ticket);
                    self.metrics.cancelled.add(1);
                }
            }
            Command::Tidy => self.schedule.tidy(),
            Command::Embed(..) | Command::Score(..) | Command::Stop => {}
        }
        Ok(())
    }

    /// Sends a result to its requester.
    fn tell<T>(&self, answer: oneshot::Sender<Result<T>>, computed: Result<T>) -> Result<()> {
        let works = match &computed {
            Ok(_) => Ok(()),
            Err(error) => still_works(self.model.device(), error),
        };
        // Sending fails if the receiver is gone.
        let _ = answer.send(computed);
        works
    }

    fn submit(&mut self, job: Job) {
        let Job { id, place, request, stream, arrived, events } = job;
        let prompt_tokens = request.prompt.tokens.len();
        match self.schedule.submit(request) {
            Ok(ticket) => {
                let spoke = false;
                let under = Under { id, place, stream, arrived, prompt_tokens, spoke, events };
                self.open.insert(ticket, under);
            }
            Err(error) => {
                let _ = events.send((place, Event::Failed(Ticket(u64::MAX), error)));
            }
        }
    }

    fn step(&mut self) -> Result<()> {
        let (open, metrics) = (&mut self.open, self.metrics);
        let worked = self.schedule.step(&mut |event| {
            pass_on(open, metrics, event);
            Ok(())
        });
        match worked {
            Ok(true) => {}
            // A scheduler that is idle while requests are open has lost them.
            Ok(false) if self.open.is_empty() => {}
            Ok(false) => self.fail("the engine lost a request"),
            Err(error) => {
                self.fail(&error.to_string());
                return still_works(self.model.device(), &error);
            }
        }
        Ok(())
    }

    /// Reports an error to all waiting clients and restarts: the state of the caches is unknown.
    fn fail(&mut self, why: &str) {
        for under in std::mem::take(&mut self.open).into_values() {
            let event = Event::Failed(Ticket(u64::MAX), Error::run(why));
            let _ = under.events.send((under.place, event));
        }
        self.schedule = self.model.scheduler(self.limits);
    }

    fn count(&self) {
        let (waiting, running) = self.schedule.load();
        self.metrics.waiting.set(waiting);
        self.metrics.running.set(running);
        self.metrics.cached_tokens.set(self.schedule.cached_tokens());
    }
}

/// Counts an event and forwards it to its handler. A handler that is gone cancels by itself.
fn pass_on(open: &mut BTreeMap<Ticket, Under>, metrics: &Metrics, event: Event) {
    let (Event::Piece(ticket, _) | Event::Done(ticket, ..) | Event::Failed(ticket, _)) = event;
    let Some(under) = open.get_mut(&ticket) else { return };
    match &event {
        Event::Piece(_, piece) => {
            metrics.generated_tokens.add(piece.ids.len());
            if !under.spoke {
                under.spoke = true;
                metrics.first_token.observe(under.arrived.elapsed());
            }
            if under.stream {
                let _ = under.events.send((under.place, event));
            }
        }
        Event::Done(_, _, scores) => {
            metrics.prompt_tokens.add(under.prompt_tokens);
            metrics.cached_prompt_tokens.add(scores.cached);
            metrics.request.observe(under.arrived.elapsed());
            let _ = under.events.send((under.place, event));
            open.remove(&ticket);
        }
        Event::Failed(..) => {
            let _ = under.events.send((under.place, event));
            open.remove(&ticket);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::Device;

    use super::*;
    use crate::generate::engine::Prompt;
    use crate::generate::sampling::Sampling;
    use crate::model::checkpoint::Checkpoint;

    /// Must not be called.
    struct Never;

    impl Others for Never {
        fn embed(&self, _: &Embed) -> Result<Vec<Vec<f32>>> {
            panic!("computed after the stop")
        }

        fn score(&self, _: &Judged) -> Result<Vec<f64>> {
            panic!("computed after the stop")
        }
    }

    fn student() -> LocalModel {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny/student");
        LocalModel::new(&Checkpoint::load_dir(&dir, &Device::Cpu).unwrap()).unwrap()
    }

    #[test]
    fn waiting_requests_are_dropped_when_the_engine_stops() {
        let model = student();
        let (sender, commands) = std::sync::mpsc::channel();
        let client = Client::new(sender.clone(), 4);
        let (answer, mut embedded) = oneshot::channel();
        let embed = Embed { texts: vec![vec![1]], pooling: Pooling::Mean };
        sender.send(Command::Embed(embed, answer)).unwrap();
        let (answer, mut scored) = oneshot::channel();
        let judged = Judged { prompt: Vec::new(), tools: None, first: 0, answers: Vec::new() };
        sender.send(Command::Score(judged, answer)).unwrap();
        client.stop();
        let metrics = Metrics::default();
        let engine = Engine::new(&model, model.limits(), &Never, &metrics);
        engine.run(&commands, &client.told_to_stop()).unwrap();
        drop(commands);
        // Their senders are gone, which tells the waiting clients.
        assert_eq!(embedded.try_recv().err(), Some(oneshot::error::TryRecvError::Closed));
        assert_eq!(scored.try_recv().err(), Some(oneshot::error::TryRecvError::Closed));
    }

    #[test]
    fn parts_have_a_bounded_size_and_cover_everything() {
        let sizes = vec![100, 20, 1, 300, 40, 0, 0];
        let parts = parts(sizes.clone(), 130, |size| *size);
        assert_eq!(parts, [vec![100, 20], vec![1], vec![300], vec![40, 0, 0]]);
        assert_eq!(parts.concat(), sizes);
    }

    /// Records how many texts were requested at once; every part is answered immediately.
    struct Counts(std::sync::Mutex<Vec<usize>>);

    impl Others for Counts {
        fn embed(&self, embed: &Embed) -> Result<Vec<Vec<f32>>> {
            self.0.lock().unwrap().push(embed.texts.len());
            Ok(vec![vec![1.0]; embed.texts.len()])
        }

        fn score(&self, judged: &Judged) -> Result<Vec<f64>> {
            self.0.lock().unwrap().push(judged.answers.len());
            // Long enough for the client to wait, however the threads are scheduled.
            std::thread::sleep(std::time::Duration::from_millis(10));
            Ok((0..judged.answers.len()).map(|at| (judged.first + at) as f64).collect())
        }
    }

    /// A client's result, run on its own thread, and the parts the engine was asked for.
    fn asked<T: Send + 'static>(
        ask: impl FnOnce(tokio::runtime::Runtime, Client) -> T + Send + 'static,
    ) -> (T, Vec<usize>) {
        let (model, metrics) = (student(), Metrics::default());
        let (sender, commands) = std::sync::mpsc::channel();
        let client = Client::new(sender, 4);
        let told_to_stop = client.told_to_stop();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let asking = std::thread::spawn(move || ask(runtime, client));
        let others = Counts(std::sync::Mutex::default());
        Engine::new(&model, model.limits(), &others, &metrics)
            .run(&commands, &told_to_stop)
            .unwrap();
        (asking.join().unwrap(), others.0.into_inner().unwrap())
    }

    #[test]
    fn texts_are_computed_in_parts_only_while_the_client_waits() {
        let judged = |count| Judged {
            prompt: Vec::new(),
            tools: None,
            first: 0,
            answers: vec!["yes".to_owned(); count],
        };
        let (scores, parts) = asked(move |runtime, client| {
            runtime.block_on(client.score(judged(200), &client.places.take().unwrap())).unwrap()
        });
        assert_eq!(scores, (0..200).map(f64::from).collect::<Vec<_>>());
        assert_eq!(parts, [128, 72]);
        let embed = Embed { texts: vec![vec![1; 2048]; 3], pooling: Pooling::Last };
        let (vectors, parts) = asked(move |runtime, client| {
            runtime.block_on(client.embed(embed, &client.places.take().unwrap())).unwrap()
        });
        assert_eq!((vectors.len(), parts), (3, vec![1, 1, 1]));
        // A client that disconnects after the first poll: at most one part was requested.
        let ((), parts) = asked(move |runtime, client| {
            runtime.block_on(async {
                let place = client.places.take().unwrap();
                let waits = client.score(judged(1000), &place);
                let gone = std::future::ready(());
                tokio::select! { biased; _ = waits => panic!("all was computed"), () = gone => {} }
            });
            assert!(client.is_idle());
        });
        assert!(parts.len() <= 1, "{parts:?}");
    }

    /// Fails at every request, as a failed GPU does.
    struct Fails(&'static str);

    impl Others for Fails {
        fn embed(&self, _: &Embed) -> Result<Vec<Vec<f32>>> {
            Err(Error::run(self.0))
        }

        fn score(&self, _: &Judged) -> Result<Vec<f64>> {
            Err(Error::run(self.0))
        }
    }

    impl Schedule for Fails {
        fn submit(&mut self, _: Request) -> Result<Ticket> {
            Ok(Ticket(0))
        }

        fn cancel(&mut self, _: Ticket) {}

        fn step(&mut self, _: &mut dyn FnMut(Event) -> Result<()>) -> Result<bool> {
            Err(Error::run(self.0))
        }

        fn load(&self) -> (usize, usize) {
            (0, 1)
        }

        fn cached_tokens(&self) -> usize {
            0
        }

        fn tidy(&mut self) {}
    }

    const LOST: &str = "DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access\")";
    const FULL: &str = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";

    /// Runs an engine that fails with this message at an embedding and then at an answer, until all clients are gone;
    /// returns its result and which of the two received the message.
    fn failing(said: &'static str, embeds: bool) -> (Result<()>, [bool; 2]) {
        let (model, metrics, others) = (student(), Metrics::default(), Fails(said));
        let (sender, commands) = std::sync::mpsc::channel();
        let client = Client::new(sender.clone(), 4);
        let (answer, mut embedded) = oneshot::channel();
        if embeds {
            let embed = Embed { texts: vec![vec![1]], pooling: Pooling::Mean };
            sender.send(Command::Embed(embed, answer)).unwrap();
        }
        let prompt = Prompt { index: 0, tokens: vec![1] };
        let request = Request::new(prompt, Arc::new(Sampling::greedy(1)));
        let mut open =
            client.generate(vec![request], false, client.places.take().unwrap()).unwrap();
        drop((sender, std::mem::replace(&mut open.commands, std::sync::mpsc::channel().0)));
        let told_to_stop = client.told_to_stop();
        drop(client);
        let mut engine = Engine::new(&model, model.limits(), &others, &metrics);
        engine.schedule = Box::new(Fails(said));
        let ended = engine.run(&commands, &told_to_stop);
        drop(commands);
        let answered = match open.events.try_recv() {
            Ok((0, Event::Failed(_, error))) => error.to_string() == said,
            _ => false,
        };
        let embedded = matches!(embedded.try_recv(), Ok(Err(error)) if error.to_string() == said);
        (ended, [embedded, answered])
    }

    #[test]
    fn lost_gpu_ends_the_engine_and_a_full_one_does_not() {
        let (ended, heard) = failing(FULL, true);
        assert!(ended.is_ok() && heard == [true, true], "{ended:?}");
        for (embeds, expected) in [(true, [true, false]), (false, [false, true])] {
            let (ended, heard) = failing(LOST, embeds);
            let error = ended.unwrap_err().to_string();
            assert_eq!(error, format!("the GPU has failed for good: {LOST}"));
            assert_eq!(heard, expected);
        }
    }
}
