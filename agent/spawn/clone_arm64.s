#include "textflag.h"

// func clone3(args *cloneArgs, size uintptr, p *params, entry uintptr) (pid uintptr, errno uintptr)
//
// The child begins on its own stack, with what it needs in registers that the
// kernel keeps, and calls entry, a Go function of one argument, as Go's internal
// ABI says: there is no goroutine, and nobody may look for one.
TEXT ·clone3(SB),NOSPLIT,$0-48
	MOVD	args+0(FP), R0
	MOVD	size+8(FP), R1
	MOVD	p+16(FP), R19
	MOVD	entry+24(FP), R20
	MOVD	$435, R8	// SYS_clone3
	SVC
	CMN	$4095, R0
	BCC	ok
	NEG	R0, R0
	MOVD	ZR, pid+32(FP)
	MOVD	R0, errno+40(FP)
	RET
ok:
	CBZ	R0, born
	MOVD	R0, pid+32(FP)
	MOVD	ZR, errno+40(FP)
	RET
born:
	MOVD	R19, R0
	MOVD	ZR, g	// no goroutine
	CALL	(R20)	// does not return
	BRK	$0
