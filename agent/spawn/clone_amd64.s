#include "textflag.h"

// func clone3(args *cloneArgs, size uintptr, p *params, entry uintptr) (pid uintptr, errno uintptr)
//
// The child begins on its own stack, with what it needs in registers that the
// kernel keeps, and calls entry, a Go function of one argument, as Go's internal
// ABI says: there is no goroutine, and nobody may look for one.
TEXT ·clone3(SB),NOSPLIT,$0-48
	MOVQ	args+0(FP), DI
	MOVQ	size+8(FP), SI
	MOVQ	p+16(FP), R12
	MOVQ	entry+24(FP), R13
	MOVL	$435, AX	// SYS_clone3
	SYSCALL
	CMPQ	AX, $0xfffffffffffff001
	JLS	ok
	NEGQ	AX
	MOVQ	$0, pid+32(FP)
	MOVQ	AX, errno+40(FP)
	RET
ok:
	TESTQ	AX, AX
	JEQ	born
	MOVQ	AX, pid+32(FP)
	MOVQ	$0, errno+40(FP)
	RET
born:
	MOVQ	R12, AX
	XORL	R14, R14	// no goroutine
	XORPS	X15, X15
	CALL	R13	// does not return
	INT	$3
