//! What the grid promises: results that do not depend on it, and errors that name what is wrong.

mod common;

use std::process::Command;
use std::time::Instant;

use common::{Buffer, ORDERS, error, line, run};
use emulated_grid::*;

#[test]
fn kernels_are_known_by_name_with_what_they_take() {
    let all = kernels(Variant::Tests);
    assert_eq!(all[0].name, "copy_all", "in the order of the source");
    let of = |name: &str| all.iter().find(|kernel| kernel.name == name).unwrap();
    let params = &of("arguments").params;
    assert_eq!(*params, [Param::Pointer, Param::Pointer, Param::Int, Param::Unsigned, Param::Float, Param::Wide]);
    assert_eq!(params.iter().map(|param| param.size_bytes()).collect::<Vec<_>>(), [8, 8, 4, 4, 4, 8]);
    assert_eq!((of("arguments").most_threads, of("at_most_64").most_threads), (1024, 64));
}

#[test]
fn each_precision_has_the_same_kernels() {
    let names = |variant| kernels(variant).into_iter().map(|kernel| kernel.name).collect::<Vec<_>>();
    let f32 = names(Variant::F32);
    assert!(!f32.is_empty());
    assert_eq!(names(Variant::Tf32), f32);
    assert_eq!(names(Variant::Bf16), f32);
}

#[test]
fn arguments_arrive_as_their_types() {
    let to = Buffer::of(&[0u64; 5]);
    for (i, word) in [(-7i32, -7i64 as u64), (-7, (-7i32) as u32 as u64), (i32::MAX, i32::MAX as u64)] {
        let args = [to.at, 0x1234_5678_9abc, word, u32::MAX.into(), (-0.5f32).to_bits().into(), u64::MAX - 1];
        run("arguments", 1, 32, 0, &args, Order::Forward).unwrap();
        let expected = [0x1234_5678_9abc, i as u64, u32::MAX.into(), (-0.5f32).to_bits().into(), u64::MAX - 1];
        assert_eq!(to.read::<u64>(), expected);
    }
}

#[test]
fn what_cannot_be_launched_is_an_error() {
    let launch = |name: &str, grid, threads, shared, args: &[u64]| {
        launch(Variant::Tests, name, grid, threads, shared, args, Order::Forward).unwrap_err()
    };
    let one = [1; 3];
    assert_eq!(launch("no_such", one, 32, 0, &[]), "no kernel `no_such` in Tests");
    assert_eq!(launch("at_most_64", one, 32, 0, &[]), "kernel `at_most_64`: takes 1 arguments, is given 0");
    assert_eq!(launch("at_most_64", one, 32, 0, &[0, 0]), "kernel `at_most_64`: takes 1 arguments, is given 2");
    for threads in [0, 31, 33, 96, 1056] {
        assert!(launch("at_most_64", one, threads, 0, &[0]).contains(&format!("blocks of {threads} threads")));
    }
    assert!(launch("reverse", one, 1056, 0, &[0, 0]).contains("blocks of 1056 threads"));
    for grid in [[0, 1, 1], [1, 0, 1], [1, 1, 0], [1 << 31, 1, 1], [1, 65536, 1], [1, 1, 65536]] {
        assert!(launch("at_most_64", grid, 32, 0, &[0]).contains("a grid of"));
    }
    assert!(launch("at_most_64", one, 32, MOST_SHARED + 1, &[0]).contains("bytes of shared memory"));
    let address = 1 << 40;
    assert!(launch("copy_all", one, 32, 0, &[0, 0, address]).contains("argument 2 is 0x10000000000, which is no Int"));
    assert!(run("at_most_64", 1, 64, MOST_SHARED, &[0], Order::Forward).is_ok());
}

#[test]
fn every_block_and_thread_runs_once_and_knows_its_place() {
    for grid in [[1, 1, 1], [5, 3, 2], [1, 7, 1], [2, 1, 9]] {
        for order in ORDERS {
            let n = (grid[0] * grid[1] * grid[2] * 64) as usize;
            let to = Buffer::unset(16 * n);
            launch(Variant::Tests, "places", grid, 64, 0, &[to.at], order).unwrap();
            for (i, place) in to.read::<[i32; 4]>().iter().enumerate() {
                let (block, thread) = (i as u32 / 64, i as i32 % 64);
                let [x, y] = [grid[0], grid[1]];
                assert_eq!(*place, [(block % x) as i32, (block / x % y) as i32, (block / x / y) as i32, thread]);
            }
        }
    }
}

#[test]
fn threads_and_blocks_come_in_the_order_that_is_asked_for() {
    let turns = |order| {
        let (next, to) = (Buffer::of(&[0u32]), Buffer::unset(4 * 640));
        run("turns", 10, 64, 0, &[next.at, to.at], order).unwrap();
        to.read::<u32>()
    };
    let forward: Vec<u32> = (0..640).collect();
    assert_eq!(turns(Order::Forward), forward);
    assert_eq!(turns(Order::Backward), forward.iter().rev().copied().collect::<Vec<_>>());
    let (a, b) = (turns(Order::Shuffled(1)), turns(Order::Shuffled(2)));
    assert_eq!(turns(Order::Shuffled(1)), a, "a seed is an order");
    assert!(a != b && a != forward && b != forward);
    for mut shuffled in [a, b] {
        shuffled.sort();
        assert_eq!(shuffled, forward);
    }
}

fn reversed(kernel: &str, order: Order) -> Vec<u32> {
    let from: Vec<f32> = (0..512).map(|i| i as f32).collect();
    let (from, to) = (Buffer::of(&from), Buffer::unset(4 * 512));
    run(kernel, 4, 128, 512, &[from.at, to.at], order).unwrap();
    to.read()
}

#[test]
fn a_right_kernel_gives_the_same_in_each_order_and_one_without_its_barrier_does_not() {
    let expected: Vec<u32> = (0..512).map(|i| ((i / 128 * 128 + 127 - i % 128) as f32).to_bits()).collect();
    for order in ORDERS {
        assert_eq!(reversed("reverse", order), expected);
        let wrong = reversed("reverse_without", order);
        assert_ne!(wrong, expected);
        assert!(wrong.iter().zip(&expected).all(|(wrong, right)| wrong == right || f32::from_bits(*wrong).is_nan()));
    }
    let wrong = ORDERS.map(|order| reversed("reverse_without", order));
    assert!(wrong.iter().any(|other| *other != wrong[0]));
}

fn rotated(order: Order) -> Vec<u32> {
    let from: Vec<f32> = (0..64).map(|i| i as f32).collect();
    let (from, to) = (Buffer::of(&from), Buffer::unset(4 * 64));
    run("rotate", 1, 64, 0, &[from.at, to.at, 5], order).unwrap();
    to.read()
}

#[test]
fn any_barrier_can_be_left_out_and_is_missed() {
    let right = reversed("reverse", Order::Forward);
    let barrier = |comment| Barrier { file: "kernels.cu".to_owned(), line: line(comment) };
    let of_block = barrier("reverse: barrier");
    assert!(barriers().contains(&of_block));
    assert_eq!(of_block.to_string(), format!("kernels.cu:{}", of_block.line));
    without_barrier(&of_block, || {
        assert_ne!(reversed("reverse", Order::Forward), right);
        let elsewhere = std::thread::spawn(|| reversed("reverse", Order::Forward)).join().unwrap();
        assert_eq!(elsewhere, right, "launches of other threads are not concerned");
    });
    assert_eq!(reversed("reverse", Order::Forward), right);

    let right = rotated(Order::Forward);
    assert_eq!(right, (0..64).map(|i| ((i / 32 * 32 + (i + 5) % 32) as f32).to_bits()).collect::<Vec<_>>());
    for comment in ["rotate: written", "rotate: read"] {
        assert!(barriers().contains(&barrier(comment)));
        let wrong = |order| without_barrier(&barrier(comment), || rotated(order)) != right;
        assert!(ORDERS.into_iter().any(wrong), "{comment}");
    }
    assert!(ORDERS.into_iter().all(|order| rotated(order) == right));
    let panicked = std::panic::catch_unwind(|| without_barrier(&of_block, || panic!("in between")));
    assert!(panicked.is_err());
    assert_eq!(rotated(Order::Forward), right);
}

#[test]
fn shared_memory_is_nan_before_each_block() {
    for order in ORDERS {
        let to = Buffer::unset(4 * 180);
        launch(Variant::Tests, "unset", [3, 1, 1], 32, 80, &[to.at, u32::MAX.into()], order).unwrap();
        assert_eq!(to.read::<u32>(), [u32::MAX; 180]);
        run("unset", 3, 32, 80, &[to.at, 5], order).unwrap();
        let last: Vec<u32> = to.read::<u32>().chunks(60).map(|block| block[59]).collect();
        assert_eq!(last, [5; 3]);
    }
}

#[test]
fn barriers_that_not_all_threads_reach_are_named_by_their_lines() {
    let to = Buffer::unset(4 * 64);
    let at = |comment| format!("kernels.cu:{}", line(comment));
    for order in ORDERS {
        let named = |kernel, parts: &[String]| {
            let error = run(kernel, 1, 64, 0, &[to.at], order).unwrap_err();
            for part in [&[format!("kernel `{kernel}`, block (0, 0, 0): a barrier that not all")], parts].concat() {
                assert!(error.contains(&part), "{error}: {part}");
            }
        };
        named("diverges", &[at("diverges: here"), at("diverges: there")]);
        named("returns_early", &[at("returns_early"), "thread 32 has returned".to_owned()]);
        named("diverges_in_a_warp", &[format!("waits at {}", at("diverges_in_a_warp"))]);
        named("deadlocks", &[at("deadlocks: barrier"), at("deadlocks: shuffle")]);
        named("sums_apart", &[at("sums_apart"), "thread 16 has returned".to_owned()]);
        assert_eq!(rotated(order), rotated(Order::Forward), "the next launch is not concerned");
    }
}

#[test]
fn a_part_of_a_warp_is_an_error() {
    let to = Buffer::unset(4 * 32);
    run("masks", 1, 32, 0, &[to.at, u32::MAX.into()], Order::Forward).unwrap();
    let error = run("masks", 1, 32, 0, &[to.at, 0xffff], Order::Backward).unwrap_err();
    let expected = format!("thread 31: the mask 0x0000ffff at kernels.cu:{} is not the whole warp", line("masks"));
    assert!(error.ends_with(&expected), "{error}");
}

#[test]
fn memory_is_nan_until_written() {
    for bytes in [0, 1, 15, 16, 17, 4095, 4096, 4097, 100_000] {
        let buffer = Buffer::unset(bytes);
        assert_eq!(buffer.at % 16, 0);
        assert!(buffer.read::<u8>().iter().all(|byte| *byte == 0xff));
        zero(buffer.at, bytes);
        assert!(buffer.read::<u8>().iter().all(|byte| *byte == 0));
    }
    let (a, b) = (Buffer::of(&[1u8, 2, 3, 4]), Buffer::unset(4));
    copy(b.at + 1, a.at, 2);
    assert_eq!(b.read::<u8>(), [0xff, 1, 2, 0xff]);
}

#[test]
fn the_host_may_touch_live_allocations_alone() {
    let panics = |f: &(dyn Fn() + std::panic::RefUnwindSafe)| {
        *std::panic::catch_unwind(f).expect_err("no panic").downcast::<String>().unwrap()
    };
    let buffer = Buffer::unset(20);
    let at = buffer.at;
    assert!(panics(&|| write(at, &[0; 21])).contains("write 21 bytes"));
    assert!(panics(&|| read(at + 20, &mut [0])).contains("0 bytes past the end of an allocation of 20"));
    assert!(panics(&|| zero(at - 1, 2)).contains("1 bytes before an allocation of 20"));
    assert!(panics(&|| copy(at, at + 8, 16)).contains("copy from"));
    assert!(panics(&|| copy(at, at + 8, 10)).contains("overlap"));
    assert!(panics(&|| free(at + 1)).contains("where no live allocation begins"));
    assert!(panics(&|| write(0, &[0])).contains("in no live allocation"));
    let gone = allocate(8);
    free(gone);
    assert!(panics(&|| free(gone)).contains("where no live allocation begins"));
    assert!(panics(&|| write(gone, &[0])).contains("byte 0 of an allocation of 8 that has been freed"));
}

#[test]
fn what_a_kernel_reads_or_writes_out_of_bounds_is_named() {
    let (from, to) = (Buffer::of(&[1f32; 1024]), Buffer::unset(4));
    let at = |i: i32| i as u32 as u64;
    let reads = |i| error("reads_at", &[from.at, to.at, at(i)]);
    for order in ORDERS {
        run("reads_at", 1, 32, 0, &[from.at, to.at, 1023], order).unwrap();
    }
    assert_eq!(reads(1024).replace(&format!("{:#x}", from.at + 4096), "AT"), {
        let does = if cfg!(target_arch = "x86_64") { "reads" } else { "touches" };
        format!("kernel `reads_at`, block (0, 0, 0): thread 3 {does} AT: 0 bytes past the end of an allocation of 4096")
    });
    assert!(reads(1025).contains("4 bytes past the end"));
    assert!(reads(-1).contains("4 bytes before an allocation of 4096"));
    let writes = error("writes_at", &[from.at, 1024]);
    assert!(writes.contains("thread 5") && writes.contains("0 bytes past the end"), "{writes}");
    if cfg!(target_arch = "x86_64") {
        assert!(writes.contains("writes 0x"), "{writes}");
    }
    assert!(error("writes_at", &[0, 2]).contains(" 0x8: in no live allocation"));
    assert!(error("writes_at", &[0x6666_6666_6666_6660, 0]).contains("no address at all"));
    let gone = allocate(4096);
    free(gone);
    let again: Vec<Buffer> = (0..20).map(|_| Buffer::unset(4096)).collect();
    assert!(again.iter().all(|buffer| buffer.at != gone));
    assert!(error("writes_at", &[gone, 3]).contains("byte 12 of an allocation of 4096 that has been freed"));
    assert_eq!(from.read::<f32>(), [1.0; 1024]);
    run("writes_at", 1, 32, 0, &[from.at, 1], Order::Forward).unwrap();
}

#[test]
fn slack_is_nan_to_read_and_an_error_to_write() {
    let (from, to) = (Buffer::of(&[1f32; 5]), Buffer::unset(4));
    for outside in [-1i32, -300, 5, 7] {
        run("reads_at", 1, 32, 0, &[from.at, to.at, outside as u32 as u64], Order::Forward).unwrap();
        assert_eq!(to.read::<u32>(), [u32::MAX]);
    }
    assert_eq!(
        error("writes_at", &[from.at, 5]),
        "kernel `writes_at` writes 0 bytes past the end of an allocation of 20"
    );
    assert_eq!(
        error("writes_at", &[from.at, -3i32 as u32 as u64]),
        "kernel `writes_at` writes 12 bytes before an allocation of 20"
    );
    run("writes_at", 1, 32, 0, &[from.at, 4], Order::Forward).unwrap();
}

#[test]
fn what_a_card_does_otherwise_is_an_error() {
    let to = Buffer::of(&[0f32; 4 * 32 + 4]);
    let at = |comment| format!("at kernels.cu:{}", line(comment));
    assert!(error("misaligned", &[to.at, to.at]).ends_with(&format!("a misaligned address {}", at("misaligned"))));
    assert!(error("misaligned", &[to.at + 12, to.at + 4]).contains("a misaligned address"));
    for outside in [8u64, 100, -1i32 as u32 as u64] {
        let expected = format!("an index outside of its array {}", at("indexes"));
        assert!(error("indexes", &[to.at, outside]).ends_with(&expected));
    }
    assert!(error("shifts", &[to.at, 32]).contains(&at("shifts")));
    run("shifts", 1, 32, 0, &[to.at, 31], Order::Forward).unwrap();
    if cfg!(target_arch = "x86_64") {
        assert!(error("divides", &[to.at, 0]).ends_with("thread 0 divides by zero"));
    }
    let error = run("writes_past_dynamic", 1, 32, 64, &[16], Order::Forward).unwrap_err();
    assert!(error.ends_with("0 bytes past the end of dynamic shared memory"), "{error}");
    run("writes_past_dynamic", 1, 32, 64, &[15], Order::Forward).unwrap();
    let read = |n| {
        run("unwritten", 1, 32, 0, &[to.at, n], Order::Forward).unwrap();
        to.read::<f32>()[31]
    };
    assert_eq!(read(8), 8.0);
    assert!(read(7).abs() > 1e30 || read(7).is_nan());
}

#[test]
fn an_overflowing_stack_is_an_error() {
    let to = Buffer::of(&[0f32; 32]);
    run("overflows_its_stack", 1, 32, 0, &[to.at, 2], Order::Forward).unwrap();
    let error = error("overflows_its_stack", &[to.at, 100]);
    assert!(error.ends_with("its stack of 131072 bytes overflows"), "{error}");
}

#[test]
fn launches_go_on_after_errors_on_any_thread() {
    let right = rotated(Order::Forward);
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let right = &right;
            scope.spawn(move || {
                let to = Buffer::unset(4 * 64);
                for i in 0..30 {
                    let failing = ["diverges", "deadlocks", "sums_apart", "returns_early"][i % 4];
                    assert!(run(failing, 2, 64, 0, &[to.at], Order::Shuffled(seed)).is_err());
                    assert!(run("writes_at", 1, 32, 0, &[to.at, 64], Order::Shuffled(seed)).is_err());
                    assert_eq!(rotated(Order::Shuffled(seed)), *right);
                }
            });
        }
    });
}

/// Run as a process of its own by the test below; it dies.
#[test]
#[ignore = "dies of a fault on purpose"]
fn faults_outside_of_kernels() {
    rotated(Order::Forward);
    // SAFETY: none: this is the fault.
    unsafe { std::ptr::without_provenance_mut::<u8>(8).write_volatile(1) };
}

#[test]
fn faults_outside_of_kernels_are_not_ours() {
    use std::os::unix::process::ExitStatusExt;
    let test = std::env::current_exe().unwrap();
    let out = Command::new(test).args(["--exact", "faults_outside_of_kernels", "--ignored"]).output().unwrap();
    assert_eq!(out.status.signal(), Some(11), "{out:?}");
}

#[test]
fn barriers_cost_little() {
    let to = Buffer::unset(4 * 128);
    let mut best = f64::MAX;
    for _ in 0..20 {
        let start = Instant::now();
        run("waits", 1, 128, 0, &[to.at, 20, 0], Order::Forward).unwrap();
        best = best.min(start.elapsed().as_secs_f64());
    }
    println!("128 threads, 20 barriers: {:.0} us", best * 1e6);
    assert!(best < 1e-3, "{best} s");
}
