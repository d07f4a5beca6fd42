//! Decides which prompts are read and which answers are decoded in the next forward pass.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rayon::prelude::*;

use super::guess::{Guess, Guesser};
use super::prefix::{self, Held, Prefixes, Reserved, Share};
use super::reading::{Reading, SCORED};
use super::running::{Running, Task};
use super::{Answer, Event, Finish, Limits, PromptScores, Request, Schedule, Ticket, Vocabulary};
use crate::error::{Error, Result};
use crate::generate::decode::{Decoder, Feed, Predictions};
use crate::generate::sampler::Draw;
use crate::generate::stop::StopStrings;
use crate::rng::Stream;

/// Event callback; an error from it ends the work.
pub(super) type On<'a> = dyn FnMut(Event) -> Result<()> + 'a;

/// Requests that failed, each with its first error.
type Failed = BTreeMap<Ticket, Error>;

/// A prefilled prompt with unfinished answers.
struct Open<C> {
    request: Arc<Request>,
    stops: Arc<StopStrings>,
    stream: Stream,
    held: Arc<Held<C>>,
    /// Logits after the prompt, from which every sample starts.
    logits: Vec<f32>,
    started: usize,
    answers: Vec<Option<Answer>>,
    scores: PromptScores,
}

/// Prefills prompts and decodes answers, one forward pass per [`step`](Schedule::step). Requests may come and go at any
/// time.
pub struct Scheduler<'a, D: Decoder> {
    decoder: &'a D,
    vocabulary: &'a dyn Vocabulary,
    limits: Limits,
    guesser: Option<(Box<dyn Guesser + 'a>, usize)>,
    next: u64,
    queue: VecDeque<(Ticket, Arc<Request>)>,
    reading: Vec<Reading<D::Cache>>,
    open: BTreeMap<Ticket, Open<D::Cache>>,
    /// Prefilled prompts with samples left to start.
    waiting: VecDeque<Ticket>,
    running: Vec<Running<D::Cache>>,
    prefixes: Prefixes<D::Cache>,
    reserved: Reserved,
    predictions: Predictions,
}

impl<'a, D: Decoder> Scheduler<'a, D> {
    /// A scheduler without work.
    pub fn new(decoder: &'a D, vocabulary: &'a dyn Vocabulary, limits: Limits) -> Self {
        Self {
            decoder,
            vocabulary,
            limits,
            guesser: None,
            next: 0,
            queue: VecDeque::new(),
            reading: Vec::new(),
            open: BTreeMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            prefixes: Prefixes::default(),
            reserved: Reserved::default(),
            predictions: Predictions::default(),
        }
    }

    /// Lets `guesser` speculate up to `most` tokens ahead.
    #[must_use]
    pub fn guessing(mut self, guesser: Box<dyn Guesser + 'a>, most: usize) -> Self {
        self.guesser = Some((guesser, most));
        self
    }

    /// Fills the batch: starts samples of prefilled prompts, and prefills more prompts when those run out.
    fn admit(&mut self, on: &mut On<'_>) -> Result<()> {
        while let Some(&ticket) = self.waiting.front() {
            let Some(open) = self.open.get(&ticket) else { break };
            let room = self.answer_room(&open.request);
            if !self.has_room(self.decoder.in_pages(room)) {
                break;
            }
            self.start(ticket, room, on)?;
        }
        if self.waiting.is_empty() {
            self.take_prompts();
        }
        let mut left = self.limits.max_prefill.max(1);
        let mut scored = SCORED;
        for one in &mut self.reading {
            left -= one.plan(left, &mut scored);
        }
        Ok(())
    }

    /// Takes prompts from the queue while there are slots for their samples. A prompt occupies the cache until its
    /// answers are done, so the largest answer yet to start must fit beside all prompts; otherwise two prompts that fit
    /// alone could deadlock.
    fn take_prompts(&mut self) {
        let samples = |request: &Request| request.sampling.num_samples;
        let coming: usize = self.reading.iter().map(|one| samples(&one.request)).sum();
        let mut places = self.limits.max_batch.saturating_sub(self.running.len() + coming);
        let mut left = self.limits.max_prefill.max(1);
        left = left.saturating_sub(self.reading.iter().map(Reading::left).sum());
        // Nothing in `waiting` here: all answers yet to start belong to prompts being read.
        let coming = self.reading.iter().map(|one| self.answer_pages(&one.request));
        let mut largest = coming.max().unwrap_or(0);
        while let Some((ticket, request)) = self.queue.front() {
            if !self.is_idle() && (places == 0 || left == 0) {
                break;
            }
            let (ticket, request) = (*ticket, Arc::clone(request));
            let tokens = &request.prompt.tokens;
            let answer = largest.max(self.answer_pages(&request));
            let prefix = self.usable_prefix(&request, answer);
            let shared = prefix.as_ref().map_or(0, |(_, len)| *len);
            let begins_like = |one: &Reading<D::Cache>| {
                one.request.extras.same_adaptation(&request.extras)
                    && prefix::common(&one.request.prompt.tokens, tokens) >= shared + prefix::WORTH
            };
            if !request.extras.prompt_logprobs && self.reading.iter().any(begins_like) {
                // Their common prefix can be shared soon.
                break;
            }
            let own = tokens.len() - shared;
            let pages = self.decoder.in_pages(own);
            if !self.has_room(pages + answer) {
                break;
            }
            largest = answer;
            self.queue.pop_front();
            places = places.saturating_sub(samples(&request));
            left = left.saturating_sub(own);
            let share = Share::new(pages, &self.reserved);
            let of = prefix.as_ref().map(|(held, len)| (Arc::clone(&held.cache), *len));
            self.reading.push(Reading {
                ticket,
                request,
                cache: self.decoder.cache(of),
                parent: prefix.map(|(held, _)| held),
                share,
                done: shared,
                now: 0,
                scores: PromptScores { cached: shared, ..PromptScores::default() },
            });
        }
    }

    /// The cached prefix a prompt may extend, if there is room for an answer of `answer` tokens in whole pages. A
    /// prompt whose tokens are to be scored must be read anew.
    fn usable_prefix(
        &mut self,
        request: &Request,
        answer: usize,
    ) -> Option<(Arc<Held<D::Cache>>, usize)> {
        let Request { prompt, extras, .. } = request;
        if extras.prompt_logprobs {
            return None;
        }
        let found = self.prefixes.find(&prompt.tokens, extras.adaptation.as_ref())?;
        let own = self.decoder.in_pages(prompt.tokens.len() - found.1);
        // An idle scheduler admits any request; reading it anew allows evicting the cache it would extend.
        (!self.is_idle() || self.fits(own + answer)).then_some(found)
    }

    /// Whether a request needing `tokens` more tokens, in whole pages, may start. One request is always admitted.
    fn has_room(&mut self, tokens: usize) -> bool {
        self.running.len() < self.limits.max_batch.max(1) && (self.fits(tokens) || self.is_idle())
    }

    /// Whether `tokens` more tokens, in whole pages, fit, evicting kept caches if needed.
    fn fits(&mut self, tokens: usize) -> bool {
        while self.cached_tokens() + tokens > self.limits.cache_tokens {
            if !self.prefixes.free_oldest() {
                return false;
            }
        }
        true
    }

    fn is_idle(&self) -> bool {
        self.running.is_empty() && self.reading.is_empty()
    }

    fn answer_room(&self, request: &Request) -> usize {
        if request.extras.prompt_only {
            // What is drawn is not read again.
            return 0;
        }
        let left = self.limits.max_positions - request.prompt.tokens.len();
        request.sampling.max_new_tokens.min(left)
    }

    fn answer_pages(&self, request: &Request) -> usize {
        self.decoder.in_pages(self.answer_room(request))
    }

    /// Starts the next sample of a prefilled prompt.
    fn start(&mut self, ticket: Ticket, room: usize, on: &mut On<'_>) -> Result<()> {
        let pages = self.decoder.in_pages(room);
        let Some(open) = self.open.get_mut(&ticket) else { return Ok(()) };
        let sample = open.started;
        open.started += 1;
        if open.started == open.request.sampling.num_samples {
            self.waiting.pop_front();
        }
        let shared = open.request.prompt.tokens.len();
        let mut running = Running::new(Task {
            ticket,
            sample,
            request: Arc::clone(&open.request),
            stops: Arc::clone(&open.stops),
            cache: self.decoder.cache(Some((Arc::clone(&open.held.cache), shared))),
            held: Arc::clone(&open.held),
            share: Share::new(pages, &self.reserved),
            rng: open.stream.at(open.request.prompt.index, sample as u64),
            room,
        });
        let mut logits = open.logits.clone();
        let vocabulary = self.vocabulary;
        match running.draw(&mut logits, vocabulary) {
            Ok(_) => {
                if let Some(piece) = running.piece(1, vocabulary) {
                    on(Event::Piece(ticket, piece))?;
                }
                if let Some(end) = running.ended.take() {
                    return self.finish(running, end, on);
                }
                self.running.push(running);
                Ok(())
            }
            Err(error) => {
                // It has the request, and with it the adapter, whose caches go only where nobody has it any more.
                drop(running);
                self.cancel(ticket);
                on(Event::Failed(ticket, error))
            }
        }
    }

    fn guess(&mut self) -> Result<()> {
        for running in &mut self.running {
            running.guess.clear();
        }
        let Some((guesser, most)) = &mut self.guesser else { return Ok(()) };
        let mut asked: Vec<Guess<'_>> = self
            .running
            .iter_mut()
            .filter(|running| running.task.room > running.ids.len() + 1)
            .map(|running| Guess {
                key: (running.task.ticket.0, running.task.sample),
                request: &running.task.request,
                ids: &running.ids,
                rng: running.task.rng.clone(),
                most: (*most).min(running.task.room - running.ids.len() - 1),
                guess: &mut running.guess,
            })
            .collect();
        guesser.guess(&mut asked)
    }

    fn forward(&mut self, predictions: &mut Predictions) -> Result<()> {
        let draws = self.decoder.draws();
        let mut feeds = Vec::with_capacity(self.running.len() + self.reading.len());
        if draws {
            // Computing the allowed tokens of grammars is slow, so it runs in parallel.
            self.running.par_iter_mut().for_each(|running| running.prepare(draws));
        } else {
            self.running.iter_mut().for_each(|running| running.prepare(draws));
        }
        feeds.extend(self.running.iter_mut().map(Running::next));
        for reading in self.reading.iter_mut().filter(|reading| reading.now > 0) {
            let wanted = reading.wanted();
            let tokens = &reading.request.prompt.tokens[reading.done..][..reading.now];
            let adaptation = reading.request.adaptation();
            feeds.push(Feed { cache: &mut reading.cache, tokens, wanted, adaptation });
        }
        self.decoder.forward(&mut feeds, predictions)
    }

    /// Samples for every answer the decoder did not sample for; returns each one's token count or error.
    fn draw(&mut self, logits: &mut [f32], draws: &mut Vec<Result<Draw>>) -> Vec<Result<usize>> {
        let vocab = self.decoder.vocab_size();
        let (decoder, vocabulary) = (self.decoder, self.vocabulary);
        let mut rows = Vec::with_capacity(self.running.len());
        let (mut rest, mut draws) = (logits, draws.drain(..));
        for running in &self.running {
            let (own, others) = rest.split_at_mut(running.rows() * vocab);
            let draw = running.is_drawn_there().then(|| {
                draws.next().unwrap_or_else(|| Err(Error::run("a decoder left out a draw")))
            });
            rows.push((own, draw));
            rest = others;
        }
        let drawn: Vec<Result<usize>> = self
            .running
            .par_iter_mut()
            .zip(rows)
            .map(|(running, (logits, draw))| match draw {
                Some(draw) => {
                    draw.and_then(|draw| running.take_drawn(draw, vocabulary)).map(|()| 1)
                }
                None => running.draw_all(logits, vocab, vocabulary),
            })
            .collect();
        let keep = |(running, drawn): (&mut Running<D::Cache>, Result<usize>)| {
            let drawn = drawn?;
            if drawn < running.feed.len() {
                // All but the last sampled token were read; that one is read next.
                let end = running.task.request.prompt.tokens.len() + running.ids.len() - 1;
                decoder.truncate(&mut running.task.cache, end)?;
            }
            Ok(drawn)
        };
        self.running.iter_mut().zip(drawn).map(keep).collect()
    }

    /// Reports the sampled tokens, and retires finished answers.
    fn report(
        &mut self,
        drawn: Vec<Result<usize>>,
        failed: &mut Failed,
        on: &mut On<'_>,
    ) -> Result<()> {
        let vocabulary = self.vocabulary;
        for (mut running, drawn) in std::mem::take(&mut self.running).into_iter().zip(drawn) {
            match drawn {
                Ok(drawn) => {
                    if let Some(piece) = running.piece(drawn, vocabulary) {
                        on(Event::Piece(running.task.ticket, piece))?;
                    }
                    match running.ended.take() {
                        Some(end) => self.finish(running, end, on)?,
                        None => self.running.push(running),
                    }
                }
                Err(error) => {
                    failed.entry(running.task.ticket).or_insert(error);
                    // Cancelling the request drops whatever is kept of it.
                    self.running.push(running);
                }
            }
        }
        Ok(())
    }

    /// Takes the predictions of the prompts that were read, and opens fully read ones. Returns those that cannot be
    /// scored.
    fn take_read(&mut self, logits: &[f32]) -> Failed {
        let vocab = self.decoder.vocab_size();
        let mut rows = logits.chunks_exact(vocab);
        let mut failed = Failed::new();
        for mut reading in std::mem::take(&mut self.reading) {
            let mut last = &[][..];
            for _ in reading.wanted().of(reading.now) {
                last = rows.next().unwrap_or_default();
                if let Err(error) = reading.score(last) {
                    failed.entry(reading.ticket).or_insert(error);
                }
            }
            reading.done += reading.now;
            if reading.left() > 0 {
                self.reading.push(reading);
            } else {
                self.open(reading, last.to_vec());
            }
        }
        failed
    }

    fn open(&mut self, reading: Reading<D::Cache>, logits: Vec<f32>) {
        let Reading { ticket, request, cache, parent, share, scores, .. } = reading;
        let held = Arc::new(Held { cache: Arc::new(cache), _share: share, _parent: parent });
        let tokens = &request.prompt.tokens;
        let next_begins_like = |(_, next): &(Ticket, Arc<Request>)| {
            next.extras.same_adaptation(&request.extras)
                && prefix::common(&next.prompt.tokens, tokens) >= prefix::WORTH
        };
        if self.limits.keep_prefixes || self.queue.front().is_some_and(next_begins_like) {
            let adaptation = request.extras.adaptation.as_ref();
            self.prefixes.keep(tokens.clone(), adaptation, Arc::clone(&held));
        }
        self.waiting.push_back(ticket);
        let open = Open {
            stops: Arc::new(StopStrings::new(&request.sampling.stop)),
            stream: Stream::new(request.sampling.seed, "generate"),
            held,
            logits,
            started: 0,
            answers: vec![None; request.sampling.num_samples],
            scores,
            request,
        };
        self.open.insert(ticket, open);
    }

    fn finish(
        &mut self,
        mut running: Running<D::Cache>,
        (finish, text): (Finish, String),
        on: &mut On<'_>,
    ) -> Result<()> {
        let answer = running.answer(finish, text);
        let Task { ticket, sample, cache, held, mut share, request, .. } = running.task;
        if let Some((guesser, _)) = &mut self.guesser {
            guesser.forget((ticket.0, sample));
        }
        if self.limits.keep_prefixes && request.sampling.num_samples == 1 {
            // The next turn of a conversation extends this one. The last token was sampled but not read.
            let mut tokens = request.prompt.tokens.clone();
            tokens.extend_from_slice(&answer.ids[..answer.ids.len() - 1]);
            share.shrink(self.decoder.in_pages(answer.ids.len() - 1));
            let held = Held { cache: Arc::new(cache), _share: share, _parent: Some(held) };
            self.prefixes.keep(tokens, request.extras.adaptation.as_ref(), Arc::new(held));
        }
        let Some(open) = self.open.get_mut(&ticket) else { return Ok(()) };
        open.answers[sample] = Some(answer);
        if open.answers.iter().any(Option::is_none) {
            return Ok(());
        }
        let Some(open) = self.open.remove(&ticket) else { return Ok(()) };
        // An adapter may have been unloaded while it answered: its caches go with the last request that has it.
        drop((request, open.request));
        self.tidy();
        on(Event::Done(ticket, open.answers.into_iter().flatten().collect(), open.scores))
    }
}

impl<D: Decoder> Schedule for Scheduler<'_, D> {
    fn submit(&mut self, request: Request) -> Result<Ticket> {
        request.check(self.limits.max_positions, self.decoder.vocab_size())?;
        let ticket = Ticket(self.next);
        self.next += 1;
        self.queue.push_back((ticket, Arc::new(request)));
        Ok(ticket)
    }

    fn cancel(&mut self, ticket: Ticket) {
        self.queue.retain(|(waiting, _)| *waiting != ticket);
        self.reading.retain(|reading| reading.ticket != ticket);
        self.waiting.retain(|waiting| *waiting != ticket);
        self.open.remove(&ticket);
        let guesser = &mut self.guesser;
        self.running.retain(|running| {
            if let (Some((guesser, _)), true) = (guesser.as_mut(), running.task.ticket == ticket) {
                guesser.forget((ticket.0, running.task.sample));
            }
            running.task.ticket != ticket
        });
        self.tidy();
    }

    fn step(&mut self, on: &mut On<'_>) -> Result<bool> {
        self.admit(on)?;
        if self.is_idle() {
            return Ok(false);
        }
        self.guess()?;
        let mut predictions = std::mem::take(&mut self.predictions);
        self.forward(&mut predictions)?;
        let vocab = self.decoder.vocab_size();
        let written: usize = self.running.iter().map(Running::rows).sum();
        let (written, read) = predictions.logits.split_at_mut(written * vocab);
        let drawn = self.draw(written, &mut predictions.draws);
        let mut failed = self.take_read(read);
        self.predictions = predictions;
        self.report(drawn, &mut failed, on)?;
        for (ticket, error) in failed {
            self.cancel(ticket);
            on(Event::Failed(ticket, error))?;
        }
        Ok(true)
    }

    fn load(&self) -> (usize, usize) {
        (self.queue.len(), self.running.len() + self.reading.len())
    }

    fn cached_tokens(&self) -> usize {
        self.reserved.load(Ordering::Relaxed)
    }

    fn tidy(&mut self) {
        self.prefixes.drop_lost();
    }
}
