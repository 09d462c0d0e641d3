// setmaxnreg: the registers of a thread, moved from one warpgroup of a block to the others. All threads of a warpgroup
// execute it; the count is a multiple of 8 from 24 to 256. PTX ISA, "setmaxnreg".
#pragma once

namespace moe_kernels::ptx {

// Waits until others have given as many. They must have: nobody ends the wait.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace moe_kernels::ptx
