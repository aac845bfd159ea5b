//! Which lists of commands are done as a graph.
//!
//! A graph saves the host's time, some microseconds a command; to make one takes longer than to do the list once. So a
//! list is written down the second time that it comes, and one that comes once costs a hash.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::device::cuda::card::Commands;

/// Graphs that are kept: each holds some of the card's memory and a copy of its list.
const KEPT: usize = 64;
/// Hashes of lists that came once.
const SEEN: usize = 1024;
/// Shorter lists are done as they are.
const SHORT: usize = 8;

/// What to do with a list.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn<'a, G> {
    /// It is this graph.
    Replay(&'a G),
    /// It came before: write it down under this hash.
    Capture(u64),
    /// Do it.
    Plain,
}

/// Graphs by their lists, the least used of which go first.
pub struct Replay<G> {
    kept: Vec<Kept<G>>,
    seen: VecDeque<u64>,
    clock: u64,
}

struct Kept<G> {
    hash: u64,
    commands: Commands,
    graph: G,
    used: u64,
}

impl<G> Default for Replay<G> {
    fn default() -> Self {
        Self { kept: Vec::with_capacity(KEPT), seen: VecDeque::with_capacity(SEEN), clock: 0 }
    }
}

impl<G> Replay<G> {
    /// What to do with `commands`, now that they have come.
    pub fn turn(&mut self, commands: &Commands) -> Turn<'_, G> {
        if commands.list.len() < SHORT {
            return Turn::Plain;
        }
        let mut hasher = DefaultHasher::new();
        commands.hash(&mut hasher);
        let hash = hasher.finish();
        self.clock += 1;
        // Addresses are baked into a graph, so all must be equal and not the hash alone.
        if let Some(at) = self.kept.iter().position(|kept| kept.hash == hash && kept.commands == *commands) {
            let kept = &mut self.kept[at];
            kept.used = self.clock;
            return Turn::Replay(&kept.graph);
        }
        if self.seen.contains(&hash) {
            return Turn::Capture(hash);
        }
        if self.seen.len() == SEEN {
            self.seen.pop_front();
        }
        self.seen.push_back(hash);
        Turn::Plain
    }

    /// Keeps the graph of a list that [`Self::turn`] said to capture.
    pub fn keep(&mut self, hash: u64, commands: &Commands, graph: G) -> &G {
        self.seen.retain(|seen| *seen != hash);
        if self.kept.len() == KEPT {
            let oldest = (0..KEPT).min_by_key(|at| self.kept[*at].used).unwrap_or(0);
            self.kept.swap_remove(oldest);
        }
        self.kept.push(Kept { hash, commands: commands.clone(), graph, used: self.clock });
        &self.kept[self.kept.len() - 1].graph
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::card::{Command, Launch};

    /// A list of `n` commands that is equal only to one of the same `address`.
    fn commands(n: usize, address: u64) -> Commands {
        let launch = Launch { kernel: "k", grid: [1, 1, 1], threads: 32, shared: 0, args: (0, 1) };
        Commands { list: vec![Command::Launch(launch); n], args: vec![address] }
    }

    /// As a queue does it: the graph of a list is its address.
    fn came(replay: &mut Replay<u64>, list: &Commands) -> &'static str {
        match replay.turn(list) {
            Turn::Replay(graph) => {
                assert_eq!(*graph, list.args[0]);
                "replayed"
            }
            Turn::Capture(hash) => {
                assert_eq!(*replay.keep(hash, list, list.args[0]), list.args[0]);
                "captured"
            }
            Turn::Plain => "plain",
        }
    }

    #[test]
    fn a_list_is_done_then_written_down_then_replayed_for_as_long_as_it_is_the_same() {
        let mut replay = Replay::default();
        let ways = [1, 1, 1, 2, 1, 2, 2].map(|address| came(&mut replay, &commands(SHORT, address)));
        assert_eq!(ways, ["plain", "captured", "replayed", "plain", "replayed", "captured", "replayed"]);
    }

    #[test]
    fn a_short_list_is_never_written_down() {
        let mut replay = Replay::default();
        assert!((0..3).all(|_| came(&mut replay, &commands(SHORT - 1, 1)) == "plain"));
    }

    #[test]
    fn the_graph_that_was_not_used_for_longest_goes_first() {
        let mut replay = Replay::default();
        let all = KEPT as u64 + 1;
        for address in 0..all {
            came(&mut replay, &commands(SHORT, address));
            // The first is used again and again, so the second is the one that goes.
            came(&mut replay, &commands(SHORT, address));
            came(&mut replay, &commands(SHORT, 0));
        }
        assert_eq!(replay.kept.len(), KEPT);
        assert_eq!(came(&mut replay, &commands(SHORT, 0)), "replayed");
        assert_eq!(came(&mut replay, &commands(SHORT, 1)), "plain");
        assert!((2..all).all(|address| came(&mut replay, &commands(SHORT, address)) == "replayed"));
    }

    #[test]
    fn what_came_once_is_forgotten_in_time() {
        let mut replay = Replay::default();
        for address in 0..2 * SEEN as u64 {
            assert_eq!(came(&mut replay, &commands(SHORT, address)), "plain");
        }
        assert_eq!(replay.seen.len(), SEEN);
    }
}
