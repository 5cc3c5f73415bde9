package hypervisor

import (
	"errors"
	"fmt"
	"os"
)

// Format is how a file holds a disk. It is never guessed: a guest that may write
// to a raw image could make it look like another format, which names further
// files of the host.
type Format string

// The formats. FormatQCOW2 has no backing file and no external data file.
const (
	FormatRaw   Format = "raw"
	FormatQCOW2 Format = "qcow2"
)

// Disk is a disk that is plugged into a running VM.
type Disk struct {
	// ID is the disk's serial number in the guest: 1 to MaxDiskID letters, digits
	// and dashes, no other disk of the VM has it.
	ID string
	// File is a regular file or a block device, open for reading and writing, or
	// for reading alone if ReadOnly is set. It stays the caller's, who may close
	// it when AttachDisk has returned.
	File *os.File
	// ReadOnly is enforced on the host's side.
	ReadOnly bool
	// Format of a regular file; optional, default FormatRaw.
	Format Format
}

// MaxDiskID is the longest ID, in bytes: a SCSI serial number.
const MaxDiskID = 36

// Validate reports the first field of d that no driver could accept.
func (d *Disk) Validate() error {
	if len(d.ID) == 0 || len(d.ID) > MaxDiskID {
		return fmt.Errorf("disk: id is %q, want 1 to %d bytes", d.ID, MaxDiskID)
	}
	for _, r := range d.ID {
		if (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' {
			return fmt.Errorf("disk: id is %q, want letters, digits and dashes", d.ID)
		}
	}
	switch d.Format {
	case "", FormatRaw, FormatQCOW2:
	default:
		return fmt.Errorf("disk %s: format is %q, want %q or %q", d.ID, d.Format, FormatRaw, FormatQCOW2)
	}
	if d.File == nil {
		return fmt.Errorf("disk %s: file is missing", d.ID)
	}
	st, err := d.File.Stat()
	if err != nil {
		return fmt.Errorf("disk %s: %w", d.ID, err)
	}
	switch {
	case st.Mode()&os.ModeDevice != 0 && st.Mode()&os.ModeCharDevice == 0:
		if d.Format == FormatQCOW2 {
			return fmt.Errorf("disk %s: format %q is for a file, and this is a block device", d.ID, d.Format)
		}
	case !st.Mode().IsRegular():
		return errors.New("disk " + d.ID + ": file is neither a regular file nor a block device")
	}
	return nil
}
