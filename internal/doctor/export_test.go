package doctor

// JudgeRoom is judgeRoom.
func JudgeRoom(path string, free, inodes uint64, counted bool) Finding {
	return judgeRoom(path, free, inodes, counted)
}
