//! Many commands in one datagram.

use std::io;

use netlink_packet_core::{DecodeError, NLM_F_ACK, NLM_F_REQUEST};
use nix::libc::ENOENT;

use super::Client;
use super::frame::{Body, Frames, Outcome};
use super::link::Received;
use super::request::{Failure, encode};
use crate::command::Command;
use crate::error::Error;

/// How often the kernel may say that it dropped answers before the rest is given up.
const MAX_LOSSES: usize = 16;

/// Answers by the place of their command in what was sent; nothing where none came.
struct Answers {
    outcomes: Vec<Option<Outcome>>,
    /// Why some are missing.
    failure: Option<Failure>,
}

impl Client {
    /// Runs as many commands as fit into one datagram and appends their results; false if the socket failed.
    pub(super) fn run_chunk(&mut self, chunk: &[Command], results: &mut Vec<Result<(), Error>>) -> bool {
        let checked: Vec<Result<(), &'static str>> = chunk.iter().map(Command::check).collect();
        let sendable: Vec<&Command> = chunk
            .iter()
            .zip(&checked)
            .filter(|(_, check)| check.is_ok())
            .map(|(command, _)| command)
            .collect();
        let (sent, alive) = self.run_sendable(&sendable);
        let mut sent = sent.into_iter();
        for (command, check) in chunk.iter().zip(checked) {
            let object = command.object();
            results.push(match check {
                Err(reason) => Err(Error::Invalid { object, reason }),
                // One result came for each that was sent.
                Ok(()) => sent.next().unwrap_or(Err(Error::NotSent { object })),
            });
        }
        alive
    }

    /// Commands that passed their check. Gives a result for each, and false if the socket failed.
    fn run_sendable(&mut self, commands: &[&Command]) -> (Vec<Result<(), Error>>, bool) {
        if commands.is_empty() {
            return (Vec::new(), true);
        }
        let mut answers = self.exchange(commands);

        // ENOENT says that a destination or scheduler is missing, or that the family's number is not valid any
        // more, and then the command did not run: those are sent again under the new number.
        let missing: Vec<usize> =
            answers.outcomes.iter().enumerate().filter_map(|(i, o)| is_missing(o).then_some(i)).collect();
        let mut gone = None;
        if !missing.is_empty() {
            match self.refresh_family() {
                Ok(false) => {}
                Ok(true) => {
                    let again: Vec<&Command> =
                        missing.iter().filter_map(|i| commands.get(*i).copied()).collect();
                    let second = self.exchange(&again);
                    for (i, outcome) in missing.into_iter().zip(second.outcomes) {
                        if let Some(place) = answers.outcomes.get_mut(i) {
                            *place = outcome;
                        }
                    }
                    answers.failure = answers.failure.or(second.failure);
                }
                Err(error) => gone = Some(error),
            }
        }

        let results = commands
            .iter()
            .zip(answers.outcomes)
            .map(|(command, outcome)| match outcome {
                Some(Outcome { errno: 0, .. }) => Ok(()),
                Some(Outcome { errno: ENOENT, .. }) if gone.is_some() => match gone {
                    Some(Error::NoIpvs) => Err(Error::NoIpvs),
                    // Which of the two meanings it had is not known.
                    _ => Err(Error::AnswerLost { object: command.object() }),
                },
                Some(outcome) => Err(Error::of_command(command, outcome.errno, outcome.message)),
                None => Err(self.unanswered(command, answers.failure.as_ref())),
            })
            .collect();
        let alive = matches!(answers.failure, None | Some(Failure::Lost)) && gone.is_none();
        (results, alive)
    }

    fn unanswered(&self, command: &Command, failure: Option<&Failure>) -> Error {
        let failure = match failure {
            None | Some(Failure::Lost) => Failure::Lost,
            Some(Failure::TimedOut) => Failure::TimedOut,
            Some(Failure::Io(error)) => Failure::Io(match error.raw_os_error() {
                Some(errno) => io::Error::from_raw_os_error(errno),
                None => error.kind().into(),
            }),
            Some(Failure::Malformed(error)) => Failure::Malformed(DecodeError::from(error.to_string())),
        };
        self.failed(command.object(), failure)
    }

    /// Sends the commands in one datagram and collects their answers.
    fn exchange(&mut self, commands: &[&Command]) -> Answers {
        let mut bytes = Vec::new();
        let mut sequences = Vec::with_capacity(commands.len());
        for command in commands {
            let sequence = self.link.next_sequence();
            sequences.push(sequence);
            encode(&mut bytes, command.to_message(), self.family, NLM_F_REQUEST | NLM_F_ACK, sequence);
        }
        let mut answers = Answers { outcomes: vec![None; commands.len()], failure: None };
        if let Err(error) = self.link.send(&bytes) {
            answers.failure = Some(Failure::Io(error));
            return answers;
        }
        self.writes += commands.len() as u64;
        self.collect(&sequences, &mut answers);
        if answers.failure.is_some() {
            self.link.set_dirty();
        }
        answers
    }

    /// Takes answers until there is one for each command.
    ///
    /// All of them are in the buffer once the datagram is sent, as the kernel runs commands within the system
    /// call. If it had to drop some, the rest is taken without waiting for more.
    fn collect(&mut self, sequences: &[u32], answers: &mut Answers) {
        let mut open = sequences.len();
        let mut losses = 0;
        while open > 0 && losses < MAX_LOSSES {
            match self.link.receive(answers.failure.is_none()) {
                Ok(Received::Datagram) => {}
                Ok(Received::Lost) => {
                    answers.failure.get_or_insert(Failure::Lost);
                    losses += 1;
                    continue;
                }
                Ok(Received::Nothing) => {
                    answers.failure.get_or_insert(Failure::TimedOut);
                    return;
                }
                Err(error) => {
                    answers.failure = Some(Failure::Io(error));
                    return;
                }
            }
            for frame in Frames(self.link.datagram()) {
                match frame {
                    Err(error) => {
                        answers.failure.get_or_insert(Failure::Malformed(error));
                    }
                    Ok(frame) => {
                        let place = sequences.iter().position(|sequence| *sequence == frame.sequence);
                        let slot = place.and_then(|i| answers.outcomes.get_mut(i));
                        if let (Some(slot @ None), Body::End(outcome)) = (slot, frame.body) {
                            *slot = Some(outcome);
                            open -= 1;
                        }
                    }
                }
            }
        }
    }
}

fn is_missing(outcome: &Option<Outcome>) -> bool {
    matches!(outcome, Some(Outcome { errno: ENOENT, .. }))
}
