use super::*;
use crate::base::parameters::Parameter;
use crate::base::problem::{Problem, Texts};
use crate::base::tokenizer::Tokenizer;
use crate::base::{Base, Config};
use crate::device::Placement;
use crate::patch::{Method, Patch, Selection};
use crate::predict::TaskPatch;

fn encoder() -> Encoder {
    let random = Base::random(Config::tiny(), 3);
    let tensor = |p: &Parameter| (p.name.clone(), random.tensor(&p.name).unwrap());
    let tensors = random.parameters().iter().map(tensor).collect();
    let words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"].map(String::from).to_vec();
    let tokenizer = Tokenizer::from_vocab(words, false).unwrap();
    let base = Base::in_memory("tiny", Config::tiny(), Some(tokenizer), tensors).unwrap();
    Encoder::new(&base, Placement { n_threads: 1, ..Placement::default() }).unwrap()
}

fn live(encoder: &Encoder, id: u64) -> Arc<Live> {
    let (selection, classes) = (Selection::new(Method::Bitfit), Problem::Classes(vec!["a".into(), "b".into()]));
    let patch = Patch::random(encoder.base(), &selection, classes, Texts::One, id).unwrap();
    Arc::new(Live { id, patch: TaskPatch::attach(patch, encoder).unwrap() })
}

fn text(length: usize) -> Arc<Encoding> {
    let ids = (0..length as u32).map(|i| 5 + i % 50).collect();
    Arc::new(Encoding { ids, type_ids: vec![0; length], truncated: false })
}

fn call(live: &Arc<Live>, lengths: &[usize]) -> Call {
    let questions = lengths.iter().map(|n| Question { task: 0, text: text(*n) }).collect();
    Call { tasks: vec![live.clone()], questions }
}

type Reply = oneshot::Receiver<Result<Answers, Refused>>;

fn queue(calls: Vec<Call>) -> (Queue, Vec<Reply>) {
    let mut queue = Queue::default();
    let mut replies = Vec::new();
    for call in calls {
        let (reply, answer) = oneshot::channel();
        let n = call.questions.len();
        queue.questions += n;
        queue.tokens += call.tokens(0..n);
        let deadline = Instant::now() + Duration::from_secs(60);
        queue.jobs.push_back(Job { call, next: 0, answers: vec![Vec::new(); n], unanswered: n, deadline, reply });
        replies.push(answer);
    }
    (queue, replies)
}

fn taken(queue: &mut Queue, budget: usize) -> Vec<(usize, usize)> {
    queue.take(budget).iter().map(|t| (t.job, t.question)).collect()
}

#[test]
fn a_long_request_does_not_hold_up_a_short_one() {
    let encoder = encoder();
    let live = live(&encoder, 0);
    let (mut queue, _replies) = queue(vec![call(&live, &[10; 100]), call(&live, &[10])]);
    // Half the budget each, and what the short one leaves goes to the oldest.
    let of_first = taken(&mut queue, 100);
    assert_eq!(of_first.len(), 10);
    assert!(of_first.contains(&(1, 0)), "{of_first:?}");
    assert_eq!(queue.jobs[0].next, 9);
}

#[test]
fn the_oldest_always_moves_and_a_text_above_the_budget_runs_alone() {
    let encoder = encoder();
    let live = live(&encoder, 0);
    let (mut of_long, _replies) = queue(vec![call(&live, &[30, 4]), call(&live, &[4, 4])]);
    assert_eq!(taken(&mut of_long, 20), [(0, 0)]);
    assert_eq!(taken(&mut of_long, 20), [(0, 1), (1, 0), (1, 1)]);
    // The second does not fit beside the first; the younger must not pass it for ever.
    let (mut queue, _replies) = queue(vec![call(&live, &[12, 12]), call(&live, &[4; 8])]);
    for _ in 0..2 {
        assert_eq!(taken(&mut queue, 20).iter().filter(|(job, _)| *job == 0).count(), 1);
    }
}

#[test]
fn what_nobody_waits_for_is_dropped_before_the_forward() {
    let encoder = encoder();
    let live = live(&encoder, 0);
    let (mut queue, mut replies) = queue(vec![call(&live, &[3]), call(&live, &[4, 5]), call(&live, &[6])]);
    queue.jobs[2].deadline = Instant::now();
    drop(replies.remove(1));
    assert_eq!(queue.drop_unwanted(Instant::now()), 3);
    assert_eq!((queue.jobs.len(), queue.questions, queue.tokens), (1, 1, 3));
    assert!(matches!(replies[1].try_recv(), Ok(Err(Refused::Late))));
}

#[test]
fn a_batch_has_a_group_a_patch_and_its_answers_go_where_they_belong() {
    let encoder = encoder();
    let (a, b) = (live(&encoder, 4), live(&encoder, 9));
    let both = Call {
        tasks: vec![b.clone(), a.clone()],
        questions: [(0, 3), (1, 3), (0, 5)].map(|(task, n)| Question { task, text: text(n) }).into(),
    };
    let (mut queue, mut replies) = queue(vec![both, call(&a, &[7])]);
    let of_all = queue.take(1000);
    let (batch, groups, order) = queue.pack(of_all);
    assert_eq!((batch.groups(), groups.len()), (&[0, 0, 1, 1][..], 2));
    queue.deliver(&order, encoder.forward(&batch, &groups));
    assert_eq!((queue.jobs.len(), queue.questions, queue.tokens), (0, 0, 0));
    let alone = |live: &Arc<Live>, n| {
        let mut batch = Batch::new();
        batch.push(&text(n).ids, &text(n).type_ids, 0, DropoutKey::default(), None);
        encoder.forward(&Arc::new(batch), &[Some(live.patch.task().clone())]).unwrap().remove(0)
    };
    assert_eq!(replies[0].try_recv().unwrap().unwrap(), [alone(&b, 3), alone(&a, 3), alone(&b, 5)]);
    assert_eq!(replies[1].try_recv().unwrap().unwrap(), [alone(&a, 7)]);
}

#[test]
fn a_failed_forward_fails_its_own_requests_alone() {
    let encoder = encoder();
    let live = live(&encoder, 0);
    let (mut queue, mut replies) = queue(vec![call(&live, &[8, 8, 8]), call(&live, &[30])]);
    let first = queue.take(20);
    let (_, _, order) = queue.pack(first);
    queue.deliver(&order, Err(Error::Device("gone".into())));
    assert!(matches!(replies[0].try_recv(), Ok(Err(Refused::Failed(_)))));
    assert_eq!((queue.jobs.len(), queue.questions, queue.tokens), (1, 1, 30));
}

#[test]
fn a_full_queue_refuses_and_a_closed_one_finishes_what_it_has() {
    let encoder = encoder();
    let live = live(&encoder, 0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let batcher = Batcher::start(encoder.clone(), 2, 64).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let full = batcher.ask(call(&live, &[3, 3, 3]), deadline).await;
        assert!(matches!(full, Err(Refused::Full { after }) if after >= Duration::from_secs(1)));
        assert_eq!(batcher.ask(call(&live, &[3, 4]), deadline).await.unwrap().len(), 2);
        assert_eq!(batcher.waiting(), (0, 0));
        batcher.close();
        assert!(matches!(batcher.ask(call(&live, &[3]), deadline).await, Err(Refused::Draining)));
    });
}
