/*
 * What the functional test of KVM runs on a vCPU, at guest-physical 0x8000 in
 * long mode, ring 0, with the first 2 MiB mapped one to one and writable for
 * everybody. It reports each step by a byte to port 0x10 and a failed check by
 * a byte to port 0x11.
 *
 * Memory that the host has prepared: GDT 0x4000 (null, 8: code, 0x10: data,
 * 0x18: null, 0x20: user data, 0x28: user code), IDT 0x5000 (empty; filled in
 * here), page directory 0x3000. 0x6000 is scratch, 0x7000 the XSAVE area.
 *
 * as --64 -o probe.o probe_amd64.S && objcopy -O binary -j .text probe.o probe.bin
 */
	.text
	.macro STEP n
	mov	$\n, %al
	out	%al, $0x10
	.endm
start:
	STEP	1			/* long mode */

	/* Descriptor tables, far return, an exception and its return. */
	lgdt	gdtr(%rip)
	lea	handler(%rip), %rax
	mov	$0x5030, %edi		/* vector 3 */
	mov	%ax, (%rdi)
	movw	$8, 2(%rdi)
	movw	$0x8e00, 4(%rdi)
	shr	$16, %rax
	mov	%ax, 6(%rdi)
	movq	$0, 8(%rdi)
	lidt	idtr(%rip)
	pushq	$8
	lea	1f(%rip), %rax
	push	%rax
	lretq
1:	mov	$0x10, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss
	movq	$0, 0x6020
	int3
	cmpq	$1, 0x6020
	jne	fail
	STEP	2

	/* cmpxchg16b, which an incomplete emulator lacks. */
	mov	$0x6000, %edi
	movq	$0x11, (%rdi)
	movq	$0x22, 8(%rdi)
	mov	$0x11, %eax
	mov	$0x22, %edx
	mov	$0x33, %ebx
	mov	$0x44, %ecx
	lock cmpxchg16b (%rdi)
	jne	fail
	cmpq	$0x33, (%rdi)
	jne	fail
	cmpq	$0x44, 8(%rdi)
	jne	fail
	STEP	3

	/* Extended state, as a kernel switches it. */
	mov	$1, %eax
	xor	%ecx, %ecx
	cpuid
	bt	$26, %ecx
	jnc	2f
	movq	$0, 0x7000		/* so that xsave itself needs no exit */
	mov	%cr4, %rax
	or	$0x40600, %rax		/* OSXSAVE, OSXMMEXCPT, OSFXSR */
	mov	%rax, %cr4
	xor	%ecx, %ecx
	xgetbv
	mov	$3, %eax
	xor	%edx, %edx
	xsetbv
	mov	$0x5a5a1234, %ebx
	movq	%rbx, %xmm0
	mov	$0x7000, %edi
	mov	$3, %eax
	xor	%edx, %edx
	xsave	(%rdi)
	pxor	%xmm0, %xmm0
	mov	$3, %eax
	xor	%edx, %edx
	xrstor	(%rdi)
	movq	%xmm0, %rax
	cmp	%rbx, %rax
	jne	fail
2:	STEP	4

	/* Model specific registers that every kernel reads and writes. */
	lea	msrs(%rip), %rsi
3:	mov	(%rsi), %ecx
	test	%ecx, %ecx
	jz	4f
	rdmsr
	wrmsr
	add	$4, %rsi
	jmp	3b
4:	mov	$0xc0000102, %ecx	/* KERNEL_GS_BASE */
	mov	$0x6000, %eax
	xor	%edx, %edx
	wrmsr
	swapgs
	cmpq	$0x33, %gs:0
	jne	fail
	swapgs
	mov	$0x10, %ecx		/* TSC */
	rdmsr
	STEP	5

	/* A second mapping, changed and flushed. */
	movq	$0x87, 0x3008		/* 2 MiB at 2 MiB -> 0 */
	mov	%cr3, %rax
	mov	%rax, %cr3
	cmpq	$0x33, 0x206000
	jne	fail
	movq	$0x55, 0x206000
	cmpq	$0x55, 0x6000
	jne	fail
	movq	$0, 0x3008
	invlpg	0x206000
	mov	%cr0, %rax
	mov	%rax, %cr0
	clts
	STEP	6

	/* To user mode and back. */
	mov	$0xc0000080, %ecx	/* EFER.SCE */
	rdmsr
	or	$1, %eax
	wrmsr
	mov	$0xc0000081, %ecx	/* STAR: kernel 8, user 0x18 */
	xor	%eax, %eax
	mov	$0x00180008, %edx
	wrmsr
	mov	$0xc0000082, %ecx	/* LSTAR */
	lea	5f(%rip), %rax
	xor	%edx, %edx
	wrmsr
	mov	$0xc0000084, %ecx	/* FMASK */
	mov	$0x700, %eax
	xor	%edx, %edx
	wrmsr
	lea	user(%rip), %rcx
	mov	$0x2, %r11d
	sysretq
user:
	mov	$0x77, %ebx
	syscall
5:	cmp	$0x77, %ebx
	jne	fail
	mov	%cs, %eax
	test	$3, %eax
	jnz	fail
	STEP	7

	/* Speed: 20 million turns. */
	mov	$20000000, %ecx
6:	dec	%ecx
	jnz	6b
	STEP	8
	hlt
fail:
	out	%al, $0x11
	hlt
handler:
	incq	0x6020
	iretq
	.balign	8
gdtr:	.word	0x2f
	.quad	0x4000
idtr:	.word	0xfff
	.quad	0x5000
	.balign	4
msrs:	.long	0x1b			/* APICBASE */
	.long	0x174, 0x175, 0x176	/* SYSENTER */
	.long	0x277			/* PAT */
	.long	0xc0000080		/* EFER */
	.long	0xc0000081, 0xc0000082, 0xc0000083, 0xc0000084
	.long	0xc0000100, 0xc0000101, 0xc0000102
	.long	0
