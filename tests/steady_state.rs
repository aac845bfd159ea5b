//! What a process costs besides the arithmetic once it runs: memory that each step asks the system for, and the
//! processor's time while nothing is asked of it. A binary of its own, for its allocator and its idle second.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bitfit::base::Base;
use bitfit::base::delta::{Delta, Head, Request};
use bitfit::base::parameters::Role;
use bitfit::device::batch::{Batch, DropoutKey, Target};
use bitfit::device::cpu::Arch;
use bitfit::device::ops::Dropout;
use bitfit::device::{Placement, PrecisionName};
use bitfit::encoder::{Encoder, Rule, Run};

/// Counts the bytes that are asked for.
struct Counting;

static ASKED: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ASKED.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// Both tests watch the whole process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn tiny() -> Base {
    Base::from_folder(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/tiny"))).unwrap()
}

fn batch(step: u32, sequences: u32, length: usize) -> Arc<Batch> {
    let mut batch = Batch::new();
    for index in 0..sequences {
        let ids: Vec<u32> = (0..length as u32).map(|i| 5 + (i + index + step) % 20).collect();
        let key = DropoutKey { seed: 1, step, index };
        batch.push(&ids, &vec![0; length], 0, key, Some(Target::Class(index % 2)));
    }
    Arc::new(batch)
}

/// A step needs thousands of numbers a token (nine kept values a layer and hidden unit, streams, scores). What it asks
/// for beside its buffers is a few lists of a number a sequence or a block of rows: hardly more where the batch has four
/// times the tokens, and the same at every step.
#[test]
fn steps_ask_for_no_memory_that_grows_with_their_activations() {
    let _alone = ONE_AT_A_TIME.lock();
    if Arch::chosen().unwrap() == Arch::Portable {
        println!("not run: where no own kernel exists, the crate that multiplies asks for memory as it likes");
        return;
    }
    let base = tiny();
    let h = base.config().hidden_size;
    for precision in [PrecisionName::F32, PrecisionName::Bf16] {
        let encoder = Encoder::new(&base, Placement { precision, n_threads: 1, ..Placement::default() }).unwrap();
        let requests: BTreeMap<_, _> = base
            .parameters()
            .iter()
            .filter(|p| matches!(p.role, Role::Bias(_)))
            .map(|p| (p.name.clone(), Request::Dense))
            .collect();
        let head = Head { n_outputs: 2, weight: vec![0.01; 2 * h], bias: vec![0.0; 2], pooler: None };
        let start = Delta { changes: BTreeMap::new(), head };
        let rule = Rule {
            learning_rate: 1e-3,
            head_learning_rate: 1e-3,
            betas: (0.9, 0.999),
            epsilon: 1e-6,
            weight_decay: 0.0,
            decay_biases: false,
            max_grad_norm: 1.0,
        };
        let dropout = Dropout { hidden: 0.1, attention: 0.1, classifier: 0.1 };
        let per_step = |length: usize| {
            let mut trainer = encoder.trainer(&[Run { requests: requests.clone(), start: start.clone() }]).unwrap();
            let asked: Vec<usize> = (0..6)
                .map(|step| {
                    let batch = batch(step, 4, length);
                    let before = ASKED.load(Ordering::Relaxed);
                    trainer.step(&[batch], dropout, &[Some(rule)]).unwrap();
                    ASKED.load(Ordering::Relaxed) - before
                })
                .collect();
            println!("{precision}, 4 x {length}: {asked:?} bytes a step");
            asked[3..].iter().copied().max().unwrap()
        };
        let (short, long) = (per_step(8), per_step(32));
        // The smallest buffer there is grows by a byte pair a token and hidden unit: 96 more tokens.
        assert!(long < short + 96 * h, "{precision}: {short} and {long} bytes");
    }
}

/// Threads that wait for work sleep.
#[test]
#[cfg(target_os = "linux")]
fn a_process_that_waits_uses_no_processor() {
    let _alone = ONE_AT_A_TIME.lock();
    let base = tiny();
    let encoder = Encoder::new(&base, Placement { n_threads: 2, ..Placement::default() }).unwrap();
    // utime and stime of the threads that the encoder started, in ticks of 1/100 s.
    let ticks = || -> u64 {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let stat = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok());
        let own = stat.filter(|stat| stat.contains("(bitfit-"));
        let used = own.map(|stat| {
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
            fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
        });
        let used: Vec<u64> = used.collect();
        assert_eq!(used.len(), 2, "the encoder's threads");
        used.iter().sum()
    };
    encoder.pooled(&batch(0, 4, 32), &[None]).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let before = ticks();
    std::thread::sleep(Duration::from_secs(1));
    let used = ticks() - before;
    assert!(used <= 2, "{used} hundredths of a second in one that waited");
}
