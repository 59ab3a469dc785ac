//! Guest modules that behave and misbehave, for the tests of the sandboxes.
//!
//! The operation `test-operation` does what the payload of the configuration says: one [`Scenario`].
#![no_std]

extern crate alloc;

#[cfg(feature = "guest")]
pub mod workers;

/// The bit of a payload that says that the guest is a process: a test that goes past core has to know.
const IN_PROCESS: u32 = 1 << 31;

macro_rules! scenarios {
    ($($(#[$doc:meta])* $name:ident = $value:literal;)*) => {
        /// What the test operation does.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Scenario { $($(#[$doc])* $name = $value,)* }

        impl Scenario {
            /// The scenario with this number.
            #[must_use]
            pub fn from_u32(value: u32) -> Option<Self> {
                match value { $($value => Some(Self::$name),)* _ => None }
            }

            /// The scenario that an operation's payload asks for, and whether in a process.
            #[must_use]
            pub fn from_payload(payload: &[u8]) -> Option<(Self, bool)> {
                let value = payload.try_into().ok().map(u32::from_le_bytes)?;
                Some((Self::from_u32(value & !IN_PROCESS)?, value & IN_PROCESS != 0))
            }

            /// The payload that asks for it, in a process or in a virtual machine.
            #[must_use]
            pub fn payload(self, in_process: bool) -> [u8; 4] {
                (self as u32 | if in_process { IN_PROCESS } else { 0 }).to_le_bytes()
            }
        }
    };
}

scenarios! {
    /// Use the heap, floats and the ring, then report success.
    Good = 0;
    /// Write to address 0.
    NullWrite = 1;
    /// Write to the module's own constants.
    ConstantWrite = 2;
    /// Execute bytes in the heap.
    HeapExecute = 3;
    /// Divide by zero.
    Divide = 4;
    /// Read CR0.
    Privileged = 5;
    /// Panic with a message.
    Panic = 6;
    /// Loop for ever.
    Stall = 7;
    /// Ring for more requests than the ring has.
    DoorbellCount = 8;
    /// `out` to an unassigned port.
    UnknownPort = 9;
    /// A READ into the stack's addresses, past core's help.
    BufferOutside = 10;
    /// Send bytes that are no message.
    BadMessage = 11;
    /// Announce a message longer than its buffer.
    LongMessage = 12;
    /// Recurse until the stack ends.
    StackOverflow = 13;
    /// Write to the configuration.
    ConfigWrite = 14;
    /// Read the supervisor's descriptor tables.
    SystemRead = 15;
    /// `in` from a port.
    PortIn = 16;
    /// `out` to the fault port from ring 3.
    FalseFault = 17;
    /// Allocate until the heap is exhausted.
    HeapExhausted = 18;
    /// Send log messages for ever.
    MessageFlood = 19;
    /// Ring for ever, one request each.
    DoorbellFlood = 20;
    /// Return without a result.
    Silent = 21;
    /// Read a device through the format module, and write through its sink.
    Foreign = 22;
    /// Write to the module's own text.
    TextWrite = 23;
    /// Read buffers on the stack and in statics.
    StackBuffer = 24;
    /// Make the output longer and longer, with SET_LENGTH.
    GrowLength = 25;
    /// Make the output longer and longer, with WRITE.
    GrowWrite = 26;
    /// Make the output longer and longer, with COPY.
    GrowCopy = 27;
    /// Write to a device that is only read.
    WriteReadOnly = 28;
    /// Read a device that is not there.
    ReadAbsent = 29;
    /// COPY a range whose end is past the largest number.
    CopyOverflow = 30;
    /// Ring for no request at all.
    DoorbellEmpty = 31;
    /// Ring for a ring whose entries are all ones.
    RingGarbage = 32;
    /// Ring for a good request, garbage, and another good one.
    RingMixed = 33;
    /// Send the longest log messages for ever.
    LongMessageFlood = 34;
    /// Send messages that are empty for ever.
    EmptyMessageFlood = 35;
    /// Loop for ever after a request, with the ring full of requests that nobody rang for.
    StallAfterRequest = 36;
    /// Change the output before there is a plan.
    EarlyWrite = 37;
    /// Plan, and change the output, though nobody may in a dry run.
    DryRunWrite = 38;
    /// Change the overlay while the output is being changed.
    EarlyOverlay = 39;
    /// Ask for the overlay while the output is not flushed, and change it.
    DirtyOverlay = 40;
    /// Plan a file that is longer than it may become, and go on.
    LyingPlan = 41;
    /// Say that it is done when only half of it is.
    FalseSuccess = 42;
    /// A whole commit: a record of the parent, the output, the overlay, each flushed.
    WholeCommit = 43;
    /// As the whole commit, but the overlay is changed more than once a record of the parent is.
    LargeRecord = 44;
    /// Say that it failed, without a code.
    FailureWithoutCode = 45;
    /// In a process: ring without waiting, and change the ring and what it names while the host is at work.
    RingWhileServed = 46;
    /// In a process: ring without taking an answer, for ever.
    AnswersNotTaken = 47;
    /// Of a repair: plan, and change the image without the phase for it.
    RepairEarly = 48;
    /// Of a repair: plan a file that is longer than it may become, and go on.
    RepairLyingPlan = 49;
    /// Of a repair: plan, and make the image longer and longer.
    RepairGrow = 50;
    /// Of a repair: say that it is done while the image is not flushed.
    RepairUnflushed = 51;
    /// Of a repair: plan to mend nothing, and change the image nevertheless.
    RepairOfNothing = 52;
    /// Share work, and report how many processors there were and that all was done once.
    WorkersGood = 53;
    /// A worker rings for requests.
    WorkerRings = 54;
    /// A worker sends a message.
    WorkerSends = 55;
    /// A worker ends the guest.
    WorkerExits = 56;
    /// A worker wakes workers.
    WorkerWakes = 57;
    /// A worker waits for workers.
    WorkerJoins = 58;
    /// A worker writes to address 0.
    WorkerFaults = 59;
    /// A worker recurses until its stack ends.
    WorkerStackOverflow = 60;
    /// A worker loops for ever, and the main processor waits for it.
    WorkerStalls = 61;
    /// A worker panics with a message.
    WorkerPanics = 62;
    /// A worker allocates memory.
    WorkerAllocates = 63;
    /// A worker writes all over the ring and the message buffer while the host serves the main processor.
    WorkerScribbles = 64;
    /// Wake more workers than there are.
    WakeTooMany = 65;
    /// Wake no worker.
    WakeNone = 66;
    /// Wake workers that are at work.
    WakeTwice = 67;
    /// Report success and end while workers are at work.
    ExitWhileWorking = 68;
    /// Wake workers and wait for them, for ever.
    WakeFlood = 69;
    /// All processors fault at the same time.
    AllFault = 70;
    /// A worker puts other requests over those that the host serves, and counts how often.
    WorkerSwaps = 71;
}
