/*
 * What a container does first is to ask for random bytes: there is no C library
 * here that would ask for some before main, and no loader. Prints 32 bytes in
 * hexadecimal and the time, and becomes the program that its arguments name.
 */
typedef long word;

#if defined(__x86_64__)
enum { WRITE = 1, EXECVE = 59, EXIT = 60, CLOCK_GETTIME = 228, GETRANDOM = 318 };
/* The kernel leaves argc, argv and envp on the stack. */
__asm__(".globl _start\n_start:\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall first\n");

static word call(word nr, word a, word b, word c)
{
	word r;
	__asm__ volatile("syscall" : "=a"(r) : "a"(nr), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
	return r;
}
#elif defined(__aarch64__)
enum { WRITE = 64, EXECVE = 221, EXIT = 93, CLOCK_GETTIME = 113, GETRANDOM = 278 };
__asm__(".globl _start\n_start:\n\tmov x0, sp\n\tbl first\n");

static word call(word nr, word a, word b, word c)
{
	register word x8 __asm__("x8") = nr;
	register word x0 __asm__("x0") = a;
	register word x1 __asm__("x1") = b;
	register word x2 __asm__("x2") = c;
	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
	return x0;
}
#else
#error "no system calls are known for this machine"
#endif

static char *decimal(char *end, word n)
{
	do
		*--end = '0' + n % 10;
	while (n /= 10);
	return end;
}

__attribute__((used)) void first(word *stack)
{
	unsigned char random[32];
	word time[2];
	word got = call(GETRANDOM, (word)random, sizeof random, 0);
	word told = call(CLOCK_GETTIME, 0 /* CLOCK_REALTIME */, (word)time, 0);
	char text[128], number[24], *p = text, *d;
	word argc = stack[0], i;
	char **argv = (char **)(stack + 1);

	if (got != sizeof random || told != 0 || argc < 2)
		call(EXIT, 99, 0, 0);
	for (i = 0; i < (word)sizeof random; i++) {
		*p++ = "0123456789abcdef"[random[i] >> 4];
		*p++ = "0123456789abcdef"[random[i] & 15];
	}
	for (i = 0; i < 2; i++) {
		*p++ = i ? ' ' : '\n';
		for (d = decimal(number + sizeof number, time[i]); d < number + sizeof number;)
			*p++ = *d++;
	}
	*p++ = '\n';
	if (call(WRITE, 1, (word)text, p - text) != p - text)
		call(EXIT, 98, 0, 0);
	call(EXECVE, (word)argv[1], (word)(argv + 1), (word)(argv + argc + 1));
	call(EXIT, 97, 0, 0);
	__builtin_unreachable();
}
