/* relax.h - the hint of a busy loop to its processor. */
#ifndef KVG_RELAX_H
#define KVG_RELAX_H

static inline void cpu_relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("isb" ::: "memory");
#endif
}

#endif
