package supervisor

const rehearsalMachine = 62 // EM_X86_64

var rehearsalCode = []byte{
	0x48, 0x83, 0x3c, 0x24, 0x01, // cmpq $1, (%rsp): argc
	0x75, 0x09, // jne wait
	0xb8, 60, 0, 0, 0, // mov $60 (exit), %eax
	0x31, 0xff, // xor %edi, %edi
	0x0f, 0x05, // syscall
	0xb8, 34, 0, 0, 0, // wait: mov $34 (pause), %eax
	0x0f, 0x05, // syscall
	0xeb, 0xf7, // jmp wait
}
