// Philox4x32-10: random bits as a function of a key and a counter (Salmon et al., SC 2011, "Parallel random numbers:
// as easy as 1, 2, 3", algorithm as in Random123). Nothing is stored: forward and backward draw the same bits, and an
// element that takes its coordinates as counter draws the same bits whatever the tiles are.

#pragma once
#include "device.h"

// 4 x 32 random bits of `counter` under the 64-bit `seed`.
PARLANCE_BOTH uint4 philox(uint64_t seed, uint4 counter) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        uint64_t a = uint64_t{0xD2511F53u} * counter.x, b = uint64_t{0xCD9E8D57u} * counter.z;
        counter = {static_cast<uint32_t>(b >> 32) ^ counter.y ^ key0, static_cast<uint32_t>(b),
                   static_cast<uint32_t>(a >> 32) ^ counter.w ^ key1, static_cast<uint32_t>(a)};
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return counter;
}

// Bits below this are dropped: probability p, in steps of 2^-32.
PARLANCE_BOTH uint32_t drop_below(double p) {
    double bound = p * 4294967296.0;
    return bound >= 4294967295.0 ? 0xFFFFFFFFu : static_cast<uint32_t>(bound);
}
