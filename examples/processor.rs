//! The instruction sets whose kernels this processor can run, the best last: what `BITFIT_CPU` may name.

use bitfit::device::cpu::Arch;

fn main() {
    for arch in Arch::available() {
        println!("{}", arch.name());
    }
}
