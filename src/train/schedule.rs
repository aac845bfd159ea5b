//! How the learning rate moves over the steps of a run.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::error::{Error, Result};

/// The course of the learning rate, as a factor from 0 to 1, after a linear warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Falls to 0 over the steps that follow the warm-up (transformers' `get_linear_schedule_with_warmup`).
    #[default]
    Linear,
    /// Stays (transformers' `get_constant_schedule_with_warmup`).
    Constant,
}

impl Schedule {
    /// The factor of step `step` of `total`, both counted from 0. The first step of a warm-up has factor 0.
    pub fn factor(self, step: u64, warmup_steps: u64, total: u64) -> f64 {
        if step < warmup_steps {
            return step as f64 / warmup_steps as f64;
        }
        match self {
            Schedule::Linear => total.saturating_sub(step) as f64 / total.saturating_sub(warmup_steps).max(1) as f64,
            Schedule::Constant => 1.0,
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Schedule::Linear => "linear",
            Schedule::Constant => "constant",
        })
    }
}

impl FromStr for Schedule {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "linear" => Ok(Schedule::Linear),
            "constant" => Ok(Schedule::Constant),
            _ => Err(Error::setting("--schedule", "linear or constant", format_args!("`{s}`"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_follows_transformers() {
        // get_linear_schedule_with_warmup(optimizer, 3, 10), its factors of steps 0 to 10.
        let expected =
            [0.0, 1.0 / 3.0, 2.0 / 3.0, 1.0, 6.0 / 7.0, 5.0 / 7.0, 4.0 / 7.0, 3.0 / 7.0, 2.0 / 7.0, 1.0 / 7.0, 0.0];
        for (step, expected) in expected.into_iter().enumerate() {
            assert_eq!(Schedule::Linear.factor(step as u64, 3, 10), expected);
        }
    }

    #[test]
    fn without_a_warm_up_the_first_step_has_the_whole_rate() {
        assert_eq!(Schedule::Linear.factor(0, 0, 10), 1.0);
        assert_eq!(Schedule::Constant.factor(0, 0, 10), 1.0);
    }

    #[test]
    fn constant_warms_up_and_stays() {
        let factors: Vec<f64> = (0..5).map(|step| Schedule::Constant.factor(step, 2, 5)).collect();
        assert_eq!(factors, [0.0, 0.5, 1.0, 1.0, 1.0]);
    }
}
