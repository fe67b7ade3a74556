//! The arithmetic of the engine on flat buffers: packed matrices ([`linear`]), attention ([`attention`]) over blocks of keys and values ([`block_pool`], cut from [`superblocks`]), the element
//! by element operations ([`elementwise`]), and the threads that share the work ([`pool`]).
//!
//! Every kernel exists as a scalar twin, which is the specification, and as AVX2 and AVX-512 versions found at run
//! time. All versions do the same floating-point operations in the same order for each output element, whatever the
//! batch around it: a token's logits do not depend on the tokens that are computed with it, nor on the processor.

pub mod attention;
pub mod block_pool;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod elementwise;
pub mod linear;
pub mod number;
pub mod pool;
mod quantised;
pub mod span_table;
pub mod superblocks;
pub mod tile;

pub use pool::Pool;
pub use quantised::Precision;

/// Instruction sets that kernels are written for, worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
}

impl Level {
    /// The best that this processor has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
            {
                return Level::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
                return Level::Avx2;
            }
        }
        Level::Scalar
    }

    /// All levels that this processor has, for tests that compare them.
    pub fn available() -> Vec<Self> {
        let best = Self::detect();
        [Level::Scalar, Level::Avx2, Level::Avx512].into_iter().filter(|l| *l <= best).collect()
    }
}

/// What every operation needs: an instruction set and threads.
pub struct Ops {
    pub level: Level,
    pub pool: Pool,
}

/// Asks the system to back memory that is not yet written with large pages, where it has them: reading all weights for each
/// token otherwise misses the address translation at every page.
pub(crate) fn prefer_large_pages<T>(memory: &mut [std::mem::MaybeUninit<T>]) {
    #[cfg(target_os = "linux")]
    {
        const LARGE: usize = 2 << 20;
        let range = memory.as_mut_ptr_range();
        let (begin, end) = ((range.start as usize).next_multiple_of(LARGE), range.end as usize / LARGE * LARGE);
        if begin < end {
            // SAFETY: the pages are inside our own allocation, and the advice changes nothing but how they are backed. That
            // it may fail (a kernel without large pages) does not matter.
            let _ = unsafe { libc::madvise(begin as *mut libc::c_void, end - begin, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

/// A buffer that several tasks write at places that do not overlap.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(*mut T, usize);

// SAFETY: tasks write disjoint places only (each use says why), and the buffer outlives the pool's run.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(buffer: &mut [T]) -> Self {
        Self(buffer.as_mut_ptr(), buffer.len())
    }

    /// The `length` elements from `start`.
    ///
    /// # Safety
    /// No other task may hold any of these elements at the same time, and the buffer must still be borrowed.
    #[allow(clippy::mut_from_ref, reason = "that is what it is for; the caller answers for disjointness")]
    pub(crate) unsafe fn slice(&self, start: usize, length: usize) -> &mut [T] {
        assert!(start + length <= self.1, "a task writes outside its buffer");
        // SAFETY: within the buffer by the assertion, disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), length) }
    }
}

/// Writes a function once and compiles it for each [`Level`]; the compiler vectorises each as far as it can. The body
/// must hold no fused multiply-add, so that all versions give the same bits.
macro_rules! versions {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        $vis fn $name(level: $crate::engine::ops::Level, $($arg: $ty),*) {
            #[inline(always)]
            fn body($($arg: $ty),*) $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512($($arg: $ty),*) {
                body($($arg),*);
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2($($arg: $ty),*) {
                body($($arg),*);
            }

            match level {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the level is only chosen where the processor has these features.
                $crate::engine::ops::Level::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                $crate::engine::ops::Level::Avx2 => unsafe { avx2($($arg),*) },
                _ => body($($arg),*),
            }
        }
    };
}
pub(crate) use versions;
