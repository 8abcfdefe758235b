//! Vector, x87 and general registers of a thread that never enters the kernel by itself.

use crate::{Guest, sys};
use anyhow::{Result, ensure};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, spawn};

struct Registers {
    stop: Arc<AtomicBool>,
    holder: Option<JoinHandle<bool>>,
    seed: u64,
}

impl Registers {
    fn hold(&mut self) {
        self.stop.store(false, Ordering::SeqCst);
        self.seed += 1;
        let (stop, seed) = (self.stop.clone(), self.seed);
        self.holder = Some(spawn(move || sys::hold_registers(seed, &stop)));
    }
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let mut registers = Registers { stop: Arc::default(), holder: None, seed: 0x1234_5678_9abc_def0 };
    registers.hold();
    Ok(Box::new(registers))
}

impl Guest for Registers {
    fn verify(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::SeqCst);
        let kept = self.holder.take().map(|holder| holder.join());
        ensure!(matches!(kept, Some(Ok(true))), "a register changed");
        self.hold();
        Ok(())
    }
}
