package relay

import (
	"encoding/binary"
	"errors"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/relay/hpack"
)

// handle acts on one frame.
func (c *conn) handle(f *frame) error {
	if c.blockID != 0 && (f.typ != frameContinuation || f.id != c.blockID) {
		return &connError{codeProtocol, "a header block was interrupted"}
	}
	if !c.settled && f.typ != frameSettings {
		return &connError{codeProtocol, "the first frame is not SETTINGS"}
	}
	if err := c.leg.spend(*f); err != nil {
		return err
	}
	switch f.typ {
	case frameData:
		return c.handleData(f)
	case frameHeaders:
		return c.handleHeaders(f)
	case frameContinuation:
		return c.handleContinuation(f)
	case framePriority:
		return c.handlePriority(f)
	case frameReset:
		return c.handleReset(f)
	case frameSettings:
		return c.handleSettings(f)
	case framePushPromise:
		return &connError{codeProtocol, "PUSH_PROMISE"}
	case framePing:
		return c.handlePing(f)
	case frameGoAway:
		if f.id != 0 {
			return &connError{codeProtocol, "GOAWAY on a stream"}
		}
		if len(f.payload) < 8 {
			return &connError{codeFrameSize, "GOAWAY too short"}
		}
		c.leg.goAway(binary.BigEndian.Uint32(f.payload)&maxStreamID, code(binary.BigEndian.Uint32(f.payload[4:])))
		return nil
	case frameWindowUpdate:
		return c.handleWindowUpdate(f)
	}
	return nil // unknown types are ignored (RFC 9113, section 4.1)
}

func (c *conn) handleData(f *frame) error {
	if f.id == 0 {
		return &connError{codeProtocol, "DATA on no stream"}
	}
	if c.leg.idle(f.id) {
		return &connError{codeProtocol, "DATA on an idle stream"}
	}
	p, err := f.unpad()
	if err != nil {
		return err
	}
	if c.receivable -= len(f.payload); c.receivable < 0 {
		return &connError{codeFlowControl, "more DATA than the connection window allows"}
	}
	return c.leg.data(f.id, p, len(f.payload), f.has(flagEndStream))
}

func (c *conn) handleHeaders(f *frame) error {
	if f.id == 0 {
		return &connError{codeProtocol, "HEADERS on no stream"}
	}
	p, err := f.unpad()
	if err != nil {
		return err
	}
	if f.has(flagPriority) {
		if len(p) < 5 {
			return &connError{codeFrameSize, "HEADERS too short for its priority"}
		}
		if binary.BigEndian.Uint32(p)&maxStreamID == f.id {
			return &connError{codeProtocol, "a stream that depends on itself"}
		}
		p = p[5:]
	}
	c.blockEnd = f.has(flagEndStream)
	if f.has(flagEndHeaders) {
		return c.decode(f.id, p)
	}
	c.blockID, c.parts, c.since = f.id, 0, c.sh.now
	c.block = append([]byte(nil), p...)
	return nil
}

// maxParts is how many CONTINUATION frames a block of a length may come in. Those
// who fill their frames never come near it; a flood of small or empty ones ends
// soon (CVE-2024-27316 and its kin).
func maxParts(length int) int { return 10 + length/8192 }

func (c *conn) handleContinuation(f *frame) error {
	if c.blockID == 0 {
		return &connError{codeProtocol, "CONTINUATION without HEADERS"}
	}
	c.parts++
	c.block = append(c.block, f.payload...)
	if c.parts > maxParts(len(c.block)) || len(c.block) > 2*c.listLimit {
		return &connError{codeEnhanceYourCalm, "header block too large or in too many frames"}
	}
	if !f.has(flagEndHeaders) {
		return nil
	}
	block, id := c.block, c.blockID
	c.block, c.blockID = nil, 0
	return c.decode(id, block)
}

// decode decodes a whole header block, whatever its stream: the table of the
// connection depends on each of them.
func (c *conn) decode(id uint32, block []byte) error {
	sh := c.sh
	list, err := c.dec.Decode(block, sh.fields[:0], c.listLimit, maxFields)
	switch {
	case errors.Is(err, hpack.ErrTooLong), errors.Is(err, hpack.ErrTooMuch):
		return &connError{codeEnhanceYourCalm, "header too large: " + err.Error()}
	case err != nil:
		return &connError{codeCompression, "header block: " + err.Error()}
	}
	sh.fields, sh.listBytes, sh.listLimit, sh.copied = list.Fields, list.Size, c.listLimit, list.Copied
	return c.leg.headers(id, c.blockEnd)
}

// maxFields is how many fields a header list may have.
const maxFields = balancer.MaxFields

// tooLarge reports whether the list in sh.fields is not to be used, since it is not
// complete.
func (sh *shard) tooLarge() bool { return sh.listBytes > sh.listLimit || len(sh.fields) > maxFields }

// maxCopied is how many bytes of a request's list may come from the tables. Both have no
// more than 7 KiB; beyond many times as much, a list repeats one field over and over: a
// byte each here, and all of it to a backend. kube-apiserver takes such lists, so those of
// a size that somebody may have in earnest pass.
const maxCopied = 256 << 10

// blownUp reports whether the list in sh.fields is of that kind.
func (sh *shard) blownUp() bool { return sh.copied > maxCopied }

func (c *conn) handlePriority(f *frame) error {
	if f.id == 0 {
		return &connError{codeProtocol, "PRIORITY on no stream"}
	}
	if len(f.payload) != 5 {
		return &connError{codeFrameSize, "PRIORITY of a wrong length"}
	}
	if binary.BigEndian.Uint32(f.payload)&maxStreamID == f.id {
		return &connError{codeProtocol, "a stream that depends on itself"}
	}
	return nil
}

func (c *conn) handleReset(f *frame) error {
	if f.id == 0 || c.leg.idle(f.id) {
		return &connError{codeProtocol, "RST_STREAM on no stream"}
	}
	if len(f.payload) != 4 {
		return &connError{codeFrameSize, "RST_STREAM of a wrong length"}
	}
	return c.leg.reset(f.id, code(binary.BigEndian.Uint32(f.payload)))
}

func (c *conn) handleSettings(f *frame) error {
	if f.id != 0 {
		return &connError{codeProtocol, "SETTINGS on a stream"}
	}
	if f.has(flagAck) {
		if len(f.payload) != 0 {
			return &connError{codeFrameSize, "SETTINGS acknowledged with a payload"}
		}
		return nil
	}
	list, err := parseSettings(f.payload)
	if err != nil {
		return err
	}
	for _, s := range list {
		if s.id == settingHeaderTableSize { // the least one counts as well (RFC 7541, section 4.2)
			c.enc.Resize(s.value)
		}
	}
	for _, s := range lastOfEach(list) {
		switch s.id {
		case settingInitialWindow:
			delta := int64(s.value) - c.initial
			c.initial = int64(s.value)
			if err := c.leg.windowChanged(delta); err != nil {
				return err
			}
		case settingMaxFrameSize:
			c.frameSize = min(int(s.value), maxFrameSize)
		case settingMaxStreams, settingMaxHeaderListSize:
			c.sh.announced(c.leg, s)
		}
	}
	c.settled = true
	if err := c.answer(); err != nil {
		return err
	}
	c.write(appendSettingsAck(c.begin(short)))
	return nil
}

// maxUnanswered bounds the answers to SETTINGS and PING that wait for a peer who
// does not read them.
const maxUnanswered = 1000

func (c *conn) answer() error {
	if c.unanswered++; c.unanswered > maxUnanswered {
		return &connError{codeEnhanceYourCalm, "answers are asked for and not read"}
	}
	return nil
}

func (c *conn) handlePing(f *frame) error {
	if f.id != 0 {
		return &connError{codeProtocol, "PING on a stream"}
	}
	if len(f.payload) != 8 {
		return &connError{codeFrameSize, "PING of a wrong length"}
	}
	if f.has(flagAck) {
		c.pingSent = time.Time{}
		return nil
	}
	if err := c.answer(); err != nil {
		return err
	}
	c.write(appendPing(c.begin(short), flagAck, f.payload))
	return nil
}

func (c *conn) handleWindowUpdate(f *frame) error {
	if len(f.payload) != 4 {
		return &connError{codeFrameSize, "WINDOW_UPDATE of a wrong length"}
	}
	increment := binary.BigEndian.Uint32(f.payload) & maxStreamID
	if f.id != 0 {
		if c.leg.idle(f.id) {
			return &connError{codeProtocol, "WINDOW_UPDATE on an idle stream"}
		}
		return c.leg.streamWindow(f.id, increment)
	}
	if increment == 0 {
		return &connError{codeProtocol, "WINDOW_UPDATE of 0"}
	}
	if c.window += int64(increment); c.window > maxWindow {
		return &connError{codeFlowControl, "connection window too large"}
	}
	if len(c.ready) > 0 {
		c.markDirty()
	}
	return nil
}
